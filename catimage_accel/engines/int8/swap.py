"""Puts a UNet's layers in INT8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from catimage_accel.engines.int8.blocks import fuse
from catimage_accel.engines.int8.choice import LayerChoice, choose_layers
from catimage_accel.engines.int8.layers import Int8Conv2d, Int8Linear
from catimage_accel.quantize.quantization import Quantization

__all__ = ["swap_layers"]


def swap_layers(
    unet: Any, quantization: Quantization, plain: str, run: Callable[[], Any], device: torch.device
) -> tuple[LayerChoice, ...]:
    """Replaces layers and blocks of ``unet`` in place; what became of each Conv2d and Linear.

    Arguments and errors are those of :func:`~.choice.choose_layers`; ValueError for scales that do not fit their layer.
    """
    choices = choose_layers(unet, quantization, plain, run, device)
    for choice in choices:
        if choice.precision == "int8":
            parent, _, own = choice.name.rpartition(".")
            layer = unet.get_submodule(choice.name)
            kind: Any = Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear
            try:
                new = kind(layer, quantization.layers[choice.name])
            except ValueError as error:
                raise ValueError(f"layer {choice.name!r}: {error}") from None
            setattr(unet.get_submodule(parent), own, new.eval())
    fused = fuse(unet)
    return tuple(
        choice if choice.precision != "int8" else replace(choice, reason=_quantizer(fused.get(choice.name)))
        for choice in choices
    )


def _quantizer(name: str | None) -> str:
    return "its input is quantized by a kernel of its own" if name is None else f"its input is quantized by {name}"
