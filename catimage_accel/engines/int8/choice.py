"""Which layers of a quantized UNet run in INT8: those it was quantized for, unless that was measured to be slower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from catimage_accel.engines.int8.layers import why_not_int8
from catimage_accel.kernels.int8_conv.shape import tuned_shape as conv_shape
from catimage_accel.kernels.int8_linear.shape import tuned_shape as linear_shape
from catimage_accel.kernels.tuning.impl import measured, measured_speedup
from catimage_accel.quantize.layers import quantizable_layers
from catimage_accel.quantize.quantization import Quantization

__all__ = ["LayerChoice", "choose_layers"]

ROWS = (2, 16)  # rows of a batch that kernels are tuned for; a layer is decided for all sizes of batch at once


@dataclass(frozen=True)
class LayerChoice:
    """What one convolution or linear layer of the UNet runs in.

    Attributes:
        name: Of the module in the UNet.
        precision: "int8", or "fp16", "bf16" or "fp32" as of the engine's other layers.
        reason: Why not INT8, or what quantizes the input; one line.
        speedup: INT8 over half precision at the layer's sizes, as measured on the device; None where it was not.
    """

    name: str
    precision: str
    reason: str
    speedup: float | None = None


def choose_layers(
    unet: Any, quantization: Quantization, plain: str, run: Callable[[], Any], device: torch.device
) -> list[LayerChoice]:
    """A choice for every Conv2d and Linear, in the UNet's order; "int8" ones still without what quantizes their input.

    A layer is in INT8 or not whatever the batch, so that a picture does not depend on what else is in its batch.

    Args:
        unet: Not yet quantized.
        quantization: Of the UNet.
        plain: Name of the precision of the layers that stay as they are.
        run: Calls the UNet on one row of its usual size; only called where something was measured on ``device``.
        device: Where it will run.

    Raises:
        ValueError: A layer of ``quantization`` is none of the UNet's.
    """
    layers = quantizable_layers(unet)
    for name in quantization.layers:
        if name not in layers:
            raise ValueError(
                f"the UNet has no Conv2d or Linear {name!r}; the quantization was made from another one"
            )
    shapes: Mapping[str, Tensor] = {}
    if any(measured(op, device) for op in ("int8_conv", "int8_linear")):
        shapes = _outputs(layers, run)
    choices = []
    for name, layer in layers.items():
        speedup = _speedup(layer, shapes[name], device) if name in shapes else None
        if name not in quantization.layers:
            reason = quantization.kept.get(name, "not quantized")
            choices.append(LayerChoice(name, plain, reason))
        elif (problem := why_not_int8(layer)) is not None:
            choices.append(LayerChoice(name, plain, f"no INT8 kernel: {problem}"))
        elif speedup is not None and speedup < 1:
            reason = f"INT8 was measured to take {1 / speedup:.2f} times as long at this size"
            choices.append(LayerChoice(name, plain, reason, speedup))
        else:
            choices.append(LayerChoice(name, "int8", "", speedup))
    return choices


def _outputs(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """What each layer makes of one row, on the meta device. One that is not called then has no entry."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: found.__setitem__(name, y.to("meta")))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _speedup(layer: Any, output: Tensor, device: torch.device) -> float | None:
    """The geometric mean over the sizes of batch."""
    speedups = []
    for rows in ROWS:
        if isinstance(layer, nn.Conv2d):
            _, channels, height, width = output.shape
            shape = conv_shape((rows, channels, height, width), layer.weight)
            found = measured_speedup("int8_conv", device, **shape)
        else:
            positions = output.numel() // layer.out_features
            x = torch.empty(rows * positions, layer.in_features, device="meta")
            found = measured_speedup("int8_linear", device, **linear_shape(x, layer.weight))
        if found is None:
            return None
        speedups.append(found)
    return math.prod(speedups) ** (1 / len(speedups))
