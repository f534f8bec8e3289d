"""A checkpoint belongs to one run: another's is refused before anything is written over it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from catimage_accel.training.checkpoint import read_checkpoint, write_checkpoint
from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=3, batch_size=2, learning_rate=0.1, precision="fp32")


def train(folder: Path, config: TrainConfig = CONFIG, model: nn.Module | None = None, **recipe: object) -> Trainer:
    model = nn.Linear(2, 2) if model is None else model
    trainer = Trainer(model, config, folder, CPU, "fit", recipe=recipe)
    trainer.run(lambda _, generator: model(torch.randn(2, 2, generator=generator)).square().mean())
    return trainer


@pytest.mark.parametrize(
    ("config", "recipe", "told"),
    [
        ({"learning_rate": 0.2}, {"teacher": "unet"}, "learning_rate = 0.1, this run has 0.2"),
        ({}, {"teacher": "other"}, "teacher = 'unet', this run has 'other'"),
        ({}, {}, "teacher = 'unet', this run has None"),
        ({}, {"teacher": "unet", "keep": [0.5, 1.0]}, r"keep = None, this run has \[0.5, 1.0\]"),
    ],
    ids=["another learning rate", "another teacher", "a setting dropped", "a setting added"],
)
def test_another_run_s_checkpoint_is_refused_and_kept(tmp_path: Path, config: dict, recipe: dict, told: str) -> None:
    train(tmp_path, teacher="unet")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=told):
        train(tmp_path, dataclasses.replace(CONFIG, **config), **recipe)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_longer_run_goes_on(tmp_path: Path) -> None:
    train(tmp_path, teacher="unet")
    longer = dataclasses.replace(CONFIG, steps=5, checkpoint_every=1, log_every=1)
    assert train(tmp_path, longer, teacher="unet").step == 5


def test_a_run_of_other_processes_is_refused(tmp_path: Path) -> None:
    """They see other batches: what comes of it is neither run."""
    train(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, step, seconds = read_checkpoint(path, CONFIG, {})
    write_checkpoint(path, tensors, step, seconds, CONFIG, {}, processes=2)
    with pytest.raises(ValueError, match="was written with processes = 2, this run has 1"):
        train(tmp_path)
    assert read_checkpoint(path, CONFIG, {}, processes=2)[1] == 3


def test_a_checkpoint_that_does_not_say_how_many_processes_is_of_one(tmp_path: Path) -> None:
    """As those of before it was kept."""
    train(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    config = json.loads(metadata["config"])
    assert config.pop("processes") == 1
    save_file(load_file(path), path, metadata | {"config": json.dumps(config)})
    assert train(tmp_path, dataclasses.replace(CONFIG, steps=4)).step == 4


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 0\.weight"):
        train(tmp_path, model=nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b'{"a": 1}'], ids=["empty", "zeros", "JSON"])
def test_a_broken_checkpoint_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is no checkpoint .*delete it to start anew") as told:
        train(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"), [("precision", "fp16"), ("steps", 0), ("accumulation", 0)], ids=["fp16", "no steps", "no batch"]
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        dataclasses.replace(CONFIG, **{name: value})
