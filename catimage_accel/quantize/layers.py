"""Which layers of a UNet can be quantized, and what each of them costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from catimage_accel.quantize.inputs import UNetInputs

__all__ = ["check_weights", "multiply_adds", "other_layers", "quantizable_layers"]


def quantizable_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Module name -> every plain Conv2d and Linear, in the UNet's order."""
    return {name: module for name, module in unet.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}


def other_layers(unet: nn.Module) -> dict[str, str]:
    """Module name -> why not, of the other convolutions and linear layers there are, such as ConvTranspose2d."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
    return {
        name: f"{type(module).__name__}; only plain Conv2d and Linear are quantized"
        for name, module in unet.named_modules()
        if isinstance(module, kinds) and type(module) not in (nn.Conv2d, nn.Linear)
    }


def check_weights(unet: nn.Module) -> None:
    """ValueError for a UNet that can't be quantized: quantized before, or with broken weights."""
    accepted = (torch.float32, torch.float16, torch.bfloat16)
    for name, parameter in unet.named_parameters():
        if parameter.dtype not in accepted:
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}; accepted: weights in float32, float16 or "
                "bfloat16, which were not quantized before"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} has NaN or infinity; accepted: finite weights, so another checkpoint")
    for name, module in unet.named_modules():
        if type(module).__name__.startswith(("FakeQuantized", "Quant", "TensorQuantizer")):
            raise ValueError(f"{name} is a {type(module).__name__}; accepted: a UNet that was not quantized before")
    if not quantizable_layers(unet):
        raise ValueError(f"{type(unet).__name__} has no plain Conv2d or Linear; accepted: a UNet with some")


def multiply_adds(unet: Any, inputs: UNetInputs) -> tuple[dict[str, int], int]:
    """(module name -> multiply-adds of each quantizable layer, those of the whole UNet), for one row of ``inputs``.

    The whole UNet's are counted in convolutions, linear layers and attention.
    """
    # The plain path of attention: the counter knows no fused CPU kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs.rows([0]).through(unet)
    counts = counter.get_flop_counts()
    root = type(unet).__name__
    return (
        {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name in quantizable_layers(unet)},
        counter.get_total_flops() // 2,
    )
