"""What a graph engine is built from: one part of a model, and the shapes it is to run at."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from catimage_accel.candidate import OWN_VAE
from catimage_accel.engines.loading import read_config
from catimage_accel.lora import UNetPart
from catimage_accel.quantize.quantization import Quantization, weights_sha256

__all__ = ["COMPONENTS", "Component", "ShapeProfile"]

COMPONENTS = ("unet", "unet-deep", "unet-shallow", "vae_decoder")


@dataclass(frozen=True)
class Component:
    """One graph of a model folder.

    ``name`` is "unet", "unet-deep" (also gives the input of the last up block, DeepCache's features), "unet-shallow"
    (takes those features and runs the outermost blocks only) or "vae_decoder". ``unet`` is the UNet's subfolder,
    ``vae`` that of the decoder's VAE; ``quantization`` the folder with the scales of an "int8" or "fp8" UNet, None for
    other precisions.
    """

    model: Path
    name: str
    unet: UNetPart = "unet"
    precision: str = "fp32"
    quantization: Path | None = None
    vae: str = OWN_VAE

    def __post_init__(self) -> None:
        if self.name not in COMPONENTS:
            raise ValueError(f"component is {self.name!r}; accepted: {', '.join(COMPONENTS)}")

    @property
    def part(self) -> UNetPart:
        """The subfolder of ``model`` that it is made from."""
        return self.vae if self.name == "vae_decoder" else self.unet

    @cached_property
    def model_sha256(self) -> str:
        """Of the part's weights and of its config, diffusers' notes on where it came from left out."""
        config = read_config(self.model / self.part / "config.json")
        said = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
        text = f"{weights_sha256(self.model, self.part)} {json.dumps(said, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def scales(self) -> Quantization | None:
        """The component's quantization, None if it has none.

        Raises FileNotFoundError or ValueError if it can't be read, was made for other weights, or its format is not
        ``precision``.
        """
        if self.quantization is None:
            return None
        scales = Quantization.load(self.quantization)
        if scales.format != self.precision:
            raise ValueError(f"precision is {self.precision!r}, but {self.quantization} holds {scales.format!r} scales")
        scales.check_source(self.model, self.unet)
        return scales


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes to be fast at: batches of ``rows`` (ascending), latents of ``height`` x ``width``, ``tokens`` of text."""

    rows: tuple[int, ...]
    height: int
    width: int
    tokens: int
    text_features: int

    def __post_init__(self) -> None:
        if not self.rows or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"rows is {self.rows}; accepted: batch sizes from 1, ascending, each once")
        for name in ("height", "width", "tokens", "text_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a whole number from 1")

    def bucket(self, rows: int) -> int | None:
        """The smallest batch size of the profile that holds so many rows, None if there is none."""
        return next((size for size in self.rows if size >= rows), None)
