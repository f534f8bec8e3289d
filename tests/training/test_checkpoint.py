"""A checkpoint belongs to one run: another's is refused before anything is written over it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

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
