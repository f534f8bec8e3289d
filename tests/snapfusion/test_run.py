"""What a run reads and writes: prompts, the device, the finished model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from catimage_accel.snapfusion.distill import finetune
from catimage_accel.snapfusion.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def run(recipe: Callable[..., Path], tmp_path: Path) -> Run:
    return Run(recipe("tuned"), tmp_path / "work", CPU, "model", "fp32")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\ufeffa dog\r\na cat\r\n", ["a dog", "a cat"]),
        ("a dog\u2028on a hill\n\n  a\x85cat \n", ["a dog\u2028on a hill", "a\x85cat"]),
        ("a dog\na cat\na bee\n", ["a dog", "a cat"]),
    ],
    ids=["as Windows' editor writes it", "other ends of lines within", "the first of them"],
)
def test_prompts_are_a_file_s_lines(run: Run, content: str, prompts: list[str]) -> None:
    (run.path.parent / "words.txt").write_bytes(content.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.prompts("words.txt", 2) == prompts


def test_fewer_prompts_than_asked_for_are_told(run: Run) -> None:
    (run.path.parent / "words.txt").write_text("a dog\na cat\n")
    with pytest.warns(UserWarning, match=r"words\.txt has 2 prompts, fewer than the 50000 asked for"):
        assert len(run.prompts("words.txt", 50_000)) == 2


def test_a_file_in_another_encoding_is_named(run: Run) -> None:
    (run.path.parent / "words.txt").write_bytes("a dog\na caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"words\.txt, line 2: b'a caf\\xe9' is not UTF-8"):
        run.prompts("words.txt", 2)


def test_a_process_of_several_puts_all_on_a_gpu_of_its_own(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is frozen, too, before accelerate has chosen a device for what is trained."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no GPU is needed to know which
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Run(recipe("tuned"), tmp_path, torch.device("cuda"), "model", "fp32").device == torch.device("cuda:1")


def test_a_result_is_replaced_and_nothing_else_is_left(run: Run) -> None:
    for bias in (1.0, 2.0):
        unet = run.unet("unet")
        with torch.no_grad():
            unet.conv_out.bias.fill_(bias)
        found = run.write(unet, {"bias": bias})
    assert load_file(found / "diffusion_pytorch_model.safetensors")["conv_out.bias"].tolist() == [2.0] * 4
    assert sorted(path.name for path in run.folder.iterdir()) == ["run.json", "unet"]


def test_a_unet_that_is_not_square_is_trained_and_watched_as_it_is(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe("wide", validation={"every": 3, "prompts": "words.txt", "number": 1})
    (tmp_path / "words.txt").write_text("a dog\n")
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config | {"sample_size": [4, 12]})
    unet.save_pretrained(tmp_path / "model" / "unet")
    finetune(path, tmp_path / "work", CPU)
    (kept,) = (tmp_path / "work").glob("latents-*.safetensors")
    assert load_file(kept)["latents"].shape == (5, 4, 4, 12)
    with Image.open(tmp_path / "work" / "wide" / "validation" / "step-000003.png") as drawn:
        assert drawn.size == (96, 32)
