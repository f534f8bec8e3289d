"""What SnapFusion's students are trained on: pictures' latents with their captions, batch by batch."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from catimage_accel.engines.loading import load_vae
from catimage_accel.quality.metric import eight_bit
from catimage_accel.quantize.quantization import weights_sha256
from catimage_accel.snapfusion.lines import text_lines
from catimage_accel.storage import file_sha256, write_tensors

METADATA_FILE = "metadata.jsonl"
ENCODE_BATCH = 16
# What PIL raises for files that are cut off, broken, of no picture or of one too large.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Captioned(Protocol):
    """A source of training pairs. ``name`` tells one source from another in checkpoints."""

    name: str

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Clean latents, float32 (size, C, h, w), scaled as the UNet sees them, and one caption each.

        What is drawn depends on ``generator`` alone.
        """
        ...


class PictureFolder:
    """The pictures of a folder with ``metadata.jsonl``, a line a picture: ``{"file_name": ..., "text": ...}``.

    That is the layout of Hugging Face's "imagefolder". Pictures are turned as their EXIF orientation says, laid on
    white where they are transparent, cropped in the middle to the shape of ``size`` pixels ((height, width), or one
    number for a square), resized to it and encoded once by ``model``'s VAE (latent means); the latents are kept in
    ``cache``.
    Raises FileNotFoundError or ValueError naming the line or the picture that can't be used.
    """

    def __init__(
        self, folder: Path, model: Path, size: int | tuple[int, int], cache: Path, device: torch.device
    ) -> None:
        rows = _read_metadata(folder)
        self.captions = [caption for _, caption in rows]
        files = [file for file, _ in rows]
        height, width = (size, size) if isinstance(size, int) else size
        shape = str(height) if height == width else f"{height}x{width}"
        self.name = f"{_digest(folder, files)[:12]}-{weights_sha256(model, 'vae')[:12]}-{shape}"
        path = cache / f"latents-{self.name}.safetensors"
        if not path.exists():
            write_tensors(path, {"latents": _encode(files, model, (height, width), device)})
        self.latents = load_file(path)["latents"]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        index = torch.randint(len(self.captions), (size,), generator=generator)
        return self.latents[index].float(), [self.captions[i] for i in index.tolist()]


def _read_metadata(folder: Path) -> list[tuple[Path, str]]:
    path = folder / METADATA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a folder of training pictures has one, a line a picture: "
            '{"file_name": "0001.png", "text": "its caption"}'
        )
    rows = []
    for number, line in text_lines(path):
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: needs file_name and text, got {line[:80]!r}") from None
        for key, value in (("file_name", name), ("text", caption)):
            if not isinstance(value, str) or not _encodable(value):
                raise ValueError(f"{path}, line {number}: {key} is {value!r}; accepted: text without lone surrogates")
        file = _within(folder, name)
        if file is None or not file.is_file():
            raise FileNotFoundError(f"{path}, line {number}: file_name is {name!r}, which is no file in {folder}")
        rows.append((file, caption))
    if not rows:
        raise ValueError(f"{path} is empty; at least one picture is needed")
    return rows


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _within(folder: Path, name: str) -> Path | None:
    """The path ``name`` in ``folder``, None if it leads out of it.

    By the names alone: a link in the folder may lead anywhere, as in a snapshot of Hugging Face's hub.
    """
    root = Path(os.path.abspath(folder))
    path = Path(os.path.normpath(root / name))
    return path if path.is_relative_to(root) and "\0" not in name else None


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """Tells captions and pictures, by what is in them: they may be copied, and go on being the same."""
    digests = [file_sha256(folder / METADATA_FILE), *map(file_sha256, files)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@torch.inference_mode()
def _encode(files: list[Path], model: Path, size: tuple[int, int], device: torch.device) -> Tensor:
    vae = load_vae(model, torch.float32).to(device)
    parts = []
    for start in track(range(0, len(files), ENCODE_BATCH), f"encoding {len(files)} pictures"):
        pixels = torch.stack([_pixels(file, size) for file in files[start : start + ENCODE_BATCH]]).to(device)
        parts.append((vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).to("cpu", torch.bfloat16))
    return torch.cat(parts)


def _pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """float32 (3, height, width) in [-1, 1]."""
    try:
        with Image.open(file) as opened:
            opened.load()
            picture = _on_white(eight_bit(_upright(opened)))
    except UNREADABLE as error:
        raise ValueError(f"{file} can't be read as a picture: {error}") from None
    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, struct.error):
        return picture  # EXIF data that can't be read say nothing of the pixels, which can


def _on_white(picture: Image.Image) -> Image.Image:
    """``picture`` in RGB; what is below transparency is no part of it."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
