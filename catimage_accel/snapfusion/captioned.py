"""What SnapFusion's students are trained on: pictures' latents with their captions, batch by batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from catimage_accel.engines.loading import load_vae
from catimage_accel.quantize.quantization import weights_sha256
from catimage_accel.storage import file_sha256, write_tensors

METADATA_FILE = "metadata.jsonl"
ENCODE_BATCH = 16


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

    That is the layout of Hugging Face's "imagefolder". Pictures are cropped to a square in the middle, resized to
    ``size`` pixels and encoded once by ``model``'s VAE (latent means); the latents are kept in ``cache``.
    Raises FileNotFoundError or ValueError naming the line or the picture that can't be used.
    """

    def __init__(self, folder: Path, model: Path, size: int, cache: Path, device: torch.device) -> None:
        rows = _read_metadata(folder)
        self.captions = [caption for _, caption in rows]
        made_from = f"{file_sha256(folder / METADATA_FILE)[:12]}-{weights_sha256(model, 'vae')[:12]}"
        self.name = f"{made_from}-{size}"
        path = cache / f"latents-{self.name}.safetensors"
        if not path.exists():
            write_tensors(path, {"latents": _encode([file for file, _ in rows], model, size, device)})
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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: needs file_name and text, got {line[:80]!r}") from None
        file = (folder / str(name)).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise FileNotFoundError(f"{path}, line {number}: file_name is {name!r}, which is no file in {folder}")
        rows.append((file, str(caption)))
    if not rows:
        raise ValueError(f"{path} is empty; at least one picture is needed")
    return rows


@torch.inference_mode()
def _encode(files: list[Path], model: Path, size: int, device: torch.device) -> Tensor:
    vae = load_vae(model, torch.float32).to(device)
    parts = []
    for start in track(range(0, len(files), ENCODE_BATCH), f"encoding {len(files)} pictures"):
        pixels = torch.stack([_pixels(file, size) for file in files[start : start + ENCODE_BATCH]]).to(device)
        parts.append((vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).to("cpu", torch.bfloat16))
    return torch.cat(parts)


def _pixels(file: Path, size: int) -> Tensor:
    """float32 (3, size, size) in [-1, 1]."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} can't be read as a picture: {error}") from None
    return torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1
