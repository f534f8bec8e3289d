"""Folders of pictures as training pairs: encoded once, and checked line by line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from catimage_accel.snapfusion import captioned
from catimage_accel.snapfusion.captioned import PictureFolder

CPU = torch.device("cpu")


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


def test_latents_are_the_scaled_means_of_the_cropped_pictures(folder: Path, sd15_shaped: Path, tmp_path: Path) -> None:
    source = PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    vae = AutoencoderKL.from_pretrained(sd15_shaped, subfolder="vae")
    picture = ImageOps.fit(Image.open(folder / "3.png"), (64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(source.latents[3].float(), expected, rtol=1e-2, atol=1e-2)  # kept in bfloat16
    latents, captions = source.batch(8, torch.Generator().manual_seed(0))
    for row, caption in zip(latents, captions, strict=True):
        assert torch.equal(row, source.latents[source.captions.index(caption)].float())
    again = source.batch(8, torch.Generator().manual_seed(0))
    assert torch.equal(latents, again[0])
    assert captions == again[1]


def test_pictures_are_encoded_once(
    folder: Path, sd15_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    monkeypatch.setattr(captioned, "_encode", lambda *_: pytest.fail("encoded again"))
    assert PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU).name == first.name
    with pytest.raises(pytest.fail.Exception):
        PictureFolder(folder, sd15_shaped, 32, tmp_path / "cache", CPU)  # another size is another set of latents


def line(**fields: str) -> str:
    return json.dumps(fields) + "\n"


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, FileNotFoundError, r"metadata\.jsonl is missing; .*file_name"),
        ("", ValueError, r"metadata\.jsonl is empty"),
        (line(file_name="0.png", text="a dog") + "{no JSON\n", ValueError, "line 2: needs file_name and text"),
        (line(file_name="0.png"), ValueError, "line 1: needs file_name and text"),
        (line(file_name="9.png", text="a dog"), FileNotFoundError, r"line 1: file_name is '9\.png', which is no file"),
        (line(file_name="../secret.png", text="a dog"), FileNotFoundError, "which is no file in"),
        (line(file_name="words.txt", text="a dog"), ValueError, r"words\.txt can't be read as a picture"),
    ],
    ids=["no metadata", "empty", "no JSON", "no caption", "no such picture", "outside the folder", "no picture"],
)
def test_what_can_t_be_used_is_named(
    folder: Path, sd15_shaped: Path, tmp_path: Path, content: str | None, error: type[Exception], told: str
) -> None:
    (folder / "words.txt").write_text("no picture")
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    if content is None:
        (folder / "metadata.jsonl").unlink()
    else:
        (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(error, match=told):
        PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    assert not list(tmp_path.glob("cache/latents-*.safetensors"))
