"""Inputs of the tiny UNet, and its quantization without ModelOpt: scales from the largest values of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from catimage_accel.quantize.quantization import LayerQuantization, Quantization, weights_sha256

KEPT = ("conv_in", "conv_out")


def unet_inputs(rows: int, height: int = 16, width: int = 16, tokens: int = 24) -> tuple[torch.Tensor, ...]:
    """Sample, timestep and text of the tiny UNet."""
    generator = torch.Generator().manual_seed(rows)
    sample = torch.randn((rows, 4, height, width), generator=generator)
    return sample, torch.linspace(1, 999, rows), torch.randn((rows, tokens, 32), generator=generator)


def measured(model: Path, unet: Any, inputs: tuple[Any, ...], *, format: str = "int8") -> Quantization:
    """Of ``model/unet``, loaded as ``unet``: outputs of convolutions too, and every feed-forward smoothed."""
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in KEPT
    }
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(name: str) -> Any:
        return lambda _, args, output: seen.__setitem__(name, (args[0], output))

    handles = [module.register_forward_hook(see(name)) for name, module in layers.items()]
    with torch.no_grad():
        unet(*inputs)
    for handle in handles:
        handle.remove()
    return Quantization(
        format, format, {name: _scales(module, *seen[name], smooth=".ff." in name) for name, module in layers.items()},
        dict.fromkeys(KEPT, "first or last"), weights_sha256(model, "unet"),
    )  # fmt: skip


def _scales(layer: Any, input: torch.Tensor, output: torch.Tensor, *, smooth: bool) -> LayerQuantization:
    scale = torch.linspace(0.5, 2.0, layer.in_features) if smooth else None
    weight = layer.weight.detach()
    if scale is not None:
        weight, input = weight / scale, input * scale
    return LayerQuantization(
        weight.abs().flatten(1).amax(1), input.abs().max(),
        output.abs().max() if isinstance(layer, nn.Conv2d) else None, scale,
    )  # fmt: skip
