"""A pruned decoder learns from the whole one, on latents that the model drew."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image

from catimage_accel.efficient_decoder import EfficientDecoderKL
from catimage_accel.snapfusion import generation
from catimage_accel.snapfusion.decoder import distill_decoder, distill_decoder_recipe, psnr_between
from catimage_accel.snapfusion.generation import generated_latents
from catimage_accel.snapfusion.pruning import pruned_decoder
from catimage_accel.training.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=120, batch_size=4, learning_rate=5e-3, warmup=5, ema_decay=0.9, precision="fp32", validate_every=60
)


@pytest.fixture
def vae(sd15_shaped: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(sd15_shaped, subfolder="vae").eval()


def latents(number: int = 24, channels: int = 4) -> torch.Tensor:
    return torch.randn(number, channels, 4, 4, generator=torch.Generator().manual_seed(0))


def test_it_comes_nearer_to_the_whole_decoder_and_the_encoder_stays(vae: AutoencoderKL, tmp_path: Path) -> None:
    student = pruned_decoder(vae, 0.5)
    before = psnr_between(vae, student, latents()[:-1])
    encoder = {name: value.clone() for name, value in student.encoder.state_dict().items()}
    distill_decoder(vae, student, latents(), CONFIG, tmp_path, CPU)
    assert psnr_between(vae, student, latents()[:-1]) > before + 3
    assert all(torch.equal(value, encoder[name]) for name, value in student.encoder.state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "psnr" in row] == [60, 120]
    # One picture is held out of 24: the whole decoder's above the student's.
    assert Image.open(tmp_path / "validation" / "step-000120.png").size == (32, 64)


def test_what_is_not_trained_is_not_rounded(vae: AutoencoderKL, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits of a weight; image-to-image would see another encoder."""
    student = pruned_decoder(vae, 0.5)
    before = {name: value.clone() for name, value in student.state_dict().items() if "decoder" not in name}
    teacher = {name: value.clone() for name, value in vae.state_dict().items()}
    config = dataclasses.replace(CONFIG, steps=2, precision="bf16", validate_every=1)
    after = distill_decoder(vae, student, latents(), config, tmp_path, CPU).state_dict()
    kept = {name for name in before if not name.startswith("post_quant_conv")}
    assert {"encoder.conv_in.weight", "quant_conv.weight"} <= kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert any(not torch.equal(after[name], before[name]) for name in before.keys() - kept)
    assert all(torch.equal(value, teacher[name]) for name, value in vae.state_dict().items())


def test_the_psnr_is_that_of_pictures(vae: AutoencoderKL) -> None:
    assert psnr_between(vae, vae, latents(2)) == pytest.approx(120)  # nothing between them but the floor
    shifted = pruned_decoder(vae, 1.0)
    with torch.no_grad():
        shifted.decoder.conv_out.bias += 0.02  # a hundredth of the range, where nothing is clipped
        assert psnr_between(vae, shifted, latents(2)) == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (latents(channels=8), r"latents are \(24, 8, 4, 4\); accepted: \(n, 4, height, width\)"),
        (latents(1), "of 1 pictures; accepted: at least 2"),
        (torch.full((3, 4, 4, 4), float("nan")), "3 of 3 latents have NaN or infinity"),
    ],
    ids=["other channels", "one picture", "not finite"],
)
def test_latents_that_can_t_be_decoded_are_refused(
    vae: AutoencoderKL, tmp_path: Path, given: torch.Tensor, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        distill_decoder(vae, pruned_decoder(vae, 0.5), given, CONFIG, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_recipe_draws_trains_and_writes_a_vae(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\na bee\n")
    path = recipe(
        "narrow", data=None, prompts="words.txt", number=3, steps=1, guidance_scale=1.0, keep=0.5, validate_every=2
    )
    folder = distill_decoder_recipe(path, tmp_path / "work", CPU)
    assert folder == tmp_path / "work" / "narrow" / "vae"
    made = EfficientDecoderKL.from_pretrained(folder)
    assert tuple(made.config.decoder_block_out_channels) == (4, 4, 8, 8)
    record = json.loads((folder.parent / "run.json").read_text())
    assert (record["keep"], record["config"]["steps"]) == (0.5, 3)


def test_several_processes_are_refused(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train a decoder of its own, and write it over the others'."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = recipe("narrow", data=None, prompts="words.txt", number=3)
    with pytest.raises(ValueError, match="distill decoder was launched in 2 processes; accepted: 1"):
        distill_decoder_recipe(path, tmp_path / "work", CPU)
    assert not (tmp_path / "work").exists()


def scheduler(model: Path) -> None:
    DDIMScheduler.from_pretrained(model / "scheduler", timestep_spacing="leading").save_pretrained(model / "scheduler")


def tokenizer(model: Path) -> None:
    words = model / "tokenizer" / "tokenizer_config.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"model_max_length": 8}))


def text_encoder(model: Path) -> None:
    described = model / "text_encoder" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"hidden_act": "gelu"}))


def unet(model: Path) -> None:
    described = model / "unet" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"sample_size": 4}))


@pytest.mark.parametrize("change", [scheduler, tokenizer, text_encoder, unet])
def test_latents_of_a_model_that_was_changed_are_drawn_anew(
    sd15_shaped: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """All that is changed is files beside the weights."""
    model = Path(shutil.copytree(sd15_shaped, tmp_path / "model"))
    given: dict[str, Any] = {"steps": 2, "guidance_scale": 1.0}
    prompts = ["a dog", "two cats and a crown on a pink background, three lemons"]
    first = generated_latents(model, prompts, tmp_path, CPU, **given)
    change(model)
    second = generated_latents(model, prompts, tmp_path, CPU, **given)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_latents_are_drawn_once_and_by_what_they_depend_on(
    sd15_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "CHUNK", 2)
    prompts = ["a dog", "two cats", "a bee"]
    given = {"steps": 1, "guidance_scale": 1.0}
    first = generated_latents(sd15_shaped, prompts, tmp_path, CPU, **given)
    assert first.shape == (3, 4, 8, 8)
    kept = sorted((tmp_path / "generated").iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    assert torch.equal(generated_latents(sd15_shaped, prompts, tmp_path, CPU, **given), first)
    assert [path.stat().st_mtime_ns for path in kept] == times
    other = generated_latents(sd15_shaped, prompts, tmp_path, CPU, **given, seed=1)
    assert not torch.equal(other[0], first[0])
    torch.testing.assert_close(  # seeds count up: prompt 1's noise is that of seed 1
        generated_latents(sd15_shaped, ["two cats"], tmp_path, CPU, **given, seed=1)[0], first[1]
    )
