"""Folders of pictures as training pairs: encoded once, and checked line by line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import ExifTags, Image, ImageOps

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


def test_replaced_pictures_are_encoded_again_and_copied_ones_are_not(
    folder: Path, sd15_shaped: Path, tmp_path: Path
) -> None:
    """The name is in checkpoints: a run does not go on with other pictures, and does on another machine."""
    first = PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    copied = PictureFolder(Path(shutil.copytree(folder, tmp_path / "copy")), sd15_shaped, 64, tmp_path / "cache", CPU)
    assert copied.name == first.name
    Image.new("RGB", (80, 70), "green").save(folder / "0.png")
    second = PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    assert second.name != first.name
    assert not torch.equal(second.latents[0], first.latents[0])
    assert torch.equal(second.latents[1:], first.latents[1:])


def test_latents_have_the_shape_asked_for(folder: Path, sd15_shaped: Path, tmp_path: Path) -> None:
    source = PictureFolder(folder, sd15_shaped, (32, 96), tmp_path / "cache", CPU)
    assert source.latents.shape == (5, 4, 4, 12)
    assert PictureFolder(folder, sd15_shaped, (96, 32), tmp_path / "cache", CPU).latents.shape == (5, 4, 12, 4)


def pixels(picture: Image.Image, path: Path, **options: Any) -> torch.Tensor:
    """What the VAE is given of ``picture`` saved as ``path``, in 0 to 255."""
    picture.save(path, **options)
    return (captioned._pixels(path, (64, 64)) + 1) * 127.5


def test_a_picture_is_turned_as_a_camera_says(tmp_path: Path) -> None:
    """A phone stores the sensor's rows and an orientation; what is seen is red on the left, blue on the right."""
    seen = Image.new("RGB", (64, 64), "blue")
    seen.paste("red", (0, 0, 32, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found = pixels(seen.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(found, pixels(seen, tmp_path / "plain.png"))


def test_broken_exif_data_do_not_matter(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    torch.testing.assert_close(
        pixels(picture, tmp_path / "broken.png", exif=b"Exif\0\0rubbish"), pixels(picture, tmp_path / "plain.png")
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """Whatever colours a program left below it: black as a rule."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (16, 16, 48, 48))
    found = pixels(picture.convert(mode), tmp_path / "clear.png")
    assert found[:, 0, 0].tolist() == [255] * 3
    assert found[:, 32, 32].tolist() == [0] * 3


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """PIL alone would make white of all above 255."""
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found = pixels(Image.fromarray(ramp), tmp_path / "ramp.png")
    expected = torch.from_numpy(ramp.astype(np.float32) / 257).expand(3, 64, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51)


def line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("\ufeff" + line(file_name="0.png", text="a dog"), ["a dog"]),
        (line(file_name="0.png", text="a dog") + "\n" + line(file_name="1.png", text="") + "\n\n", ["a dog", ""]),
        (line(file_name="0.png", text="a dog").replace("\n", "\r\n"), ["a dog"]),
        ('{"file_name": "0.png", "text": "a\u2028dog\x85in rows"}\n', ["a\u2028dog\x85in rows"]),
        (line(file_name="deep/../0.png", text="a dog"), ["a dog"]),
    ],
    ids=["a byte order mark", "blank lines", "Windows' lines", "other ends of lines within", "back and forth"],
)
def test_captions_are_read_as_they_are_written(folder: Path, content: str, captions: list[str]) -> None:
    (folder / "metadata.jsonl").write_bytes(content.encode())
    assert [caption for _, caption in captioned._read_metadata(folder)] == captions


def test_a_link_may_lead_out_of_the_folder(folder: Path, sd15_shaped: Path, tmp_path: Path) -> None:
    """A snapshot of Hugging Face's hub is made of links to blobs beside it."""
    expected = PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU).latents
    (tmp_path / "blobs").mkdir()
    for picture in folder.glob("*.png"):
        picture.rename(tmp_path / "blobs" / picture.name)
        picture.symlink_to(tmp_path / "blobs" / picture.name)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert torch.equal(PictureFolder(linked, sd15_shaped, 64, tmp_path / "anew", CPU).latents, expected)


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, FileNotFoundError, r"metadata\.jsonl is missing; .*file_name"),
        ("", ValueError, r"metadata\.jsonl is empty"),
        (line(file_name="0.png", text="a dog") + "{no JSON\n", ValueError, "line 2: needs file_name and text"),
        (line(file_name="0.png"), ValueError, "line 1: needs file_name and text"),
        (line(file_name="9.png", text="a dog"), FileNotFoundError, r"line 1: file_name is '9\.png', which is no file"),
        (line(file_name="../secret.png", text="a dog"), FileNotFoundError, "which is no file in"),
        (line(file_name="deep/../../secret.png", text="a dog"), FileNotFoundError, "which is no file in"),
        (line(file_name="0.png\0", text="a dog"), FileNotFoundError, "which is no file in"),
        (line(file_name="0.png", text=None), ValueError, "line 1: text is None; accepted: text"),
        (line(file_name="0.png", text=["a dog"]), ValueError, r"line 1: text is \['a dog'\]; accepted: text"),
        (line(file_name=0, text="a dog"), ValueError, "line 1: file_name is 0; accepted: text"),
        (line(file_name="0.png", text="cut \ud83d"), ValueError, r"line 1: text is 'cut \\ud83d'; .* lone surrogates"),
        ("\n{\udcff}\n", ValueError, r"line 2: b'\{\\xff\}' is not UTF-8"),
        (line(file_name="words.txt", text="a dog"), ValueError, r"words\.txt can't be read as a picture"),
        (line(file_name="float.tiff", text="a dog"), ValueError, r"float\.tiff can't be read .*floats.*accepted: 8"),
        (line(file_name="cut.png", text="a dog"), ValueError, r"cut\.png can't be read as a picture"),
        (line(file_name="huge.png", text="a dog"), ValueError, r"huge\.png can't be read .*exceeds limit"),
    ],
    ids=[
        "no metadata", "empty", "no JSON", "no caption", "no such picture", "outside the folder",
        "outside the folder in the end", "a zero byte", "a caption that is none", "captions", "a number for a name",
        "half a letter", "not UTF-8", "no picture", "floats", "half a picture", "a picture too large to decode",
    ],
)
def test_what_can_t_be_used_is_named(
    folder: Path, sd15_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None,
    error: type[Exception], told: str,
) -> None:  # fmt: skip
    (folder / "words.txt").write_text("no picture")
    Image.new("F", (8, 8)).save(folder / "float.tiff")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    Image.new("1", (1000, 1000)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    if content is None:
        (folder / "metadata.jsonl").unlink()
    else:
        (folder / "metadata.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(error, match=told) as raised:
        PictureFolder(folder, sd15_shaped, 64, tmp_path / "cache", CPU)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("cache/latents-*.safetensors"))
