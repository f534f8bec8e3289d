"""Which graphs a model needs to draw, and at which shapes: what can be built before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from catimage_accel.candidate import OWN_VAE
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.loading import PRECISIONS, check_model_folder, check_precision, latent_size, read_config
from catimage_accel.engines.text_encoders import text_widths
from catimage_accel.lora import UNetPart

__all__ = ["components_of", "shape_profile", "target_device"]

_ON_CUDA = ("tensorrt", "tensorrt-rtx")


def target_device(engine: str, device: torch.device) -> torch.device:
    """The kind of device that an engine built here runs on: TensorRT's need CUDA, wherever they are built."""
    return torch.device("cuda") if engine in _ON_CUDA and device.type != "cuda" else device


def components_of(
    model: Path, unet: UNetPart, precision: str, quantization: Path | None, target: torch.device, *, deepcache: bool,
    vae: str = OWN_VAE,
) -> list[Component]:  # fmt: skip
    """The UNet, with DeepCache its two parts as well, and the decoder of ``vae``, in the precisions that they have on
    ``target``.

    What is not quantized is float16 on CUDA and float32 elsewhere; a float16 decoder whose config says
    ``force_upcast`` is float32. Reads configs only; FileNotFoundError or ValueError for folders that can't be run.
    """
    dtype = check_precision(precision, target)
    check_model_folder(model, unet, vae)
    if dtype == torch.float16 and read_config(model / vae / "config.json").get("force_upcast", True):
        dtype = torch.float32
    decoder = next(name for name, found in PRECISIONS.items() if found == dtype)
    names = ("unet", "unet-deep", "unet-shallow") if deepcache else ("unet",)
    return [
        *(Component(model, name, unet, precision, quantization) for name in names),
        Component(model, "vae_decoder", unet, decoder, vae=vae),
    ]


def shape_profile(model: Path, unet: UNetPart, rows: Sequence[int]) -> ShapeProfile:
    """Batches of ``rows`` at the size that the UNet was trained on, with its text encoders' number of tokens."""
    from transformers import CLIPTokenizer

    height, width = latent_size(read_config(model / unet / "config.json"))
    tokenizer = CLIPTokenizer.from_pretrained(str(model), subfolder="tokenizer", local_files_only=True)
    return ShapeProfile(tuple(rows), height, width, tokenizer.model_max_length, text_widths(model)[0])
