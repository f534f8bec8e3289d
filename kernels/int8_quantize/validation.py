"""What ``int8_quantize`` accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import check_scale
from catimage_accel.kernels.validation import check_same_device


def validate(x: Tensor, scale: float, input_scale: Tensor | None) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; accepted: a floating-point tensor with dimensions"
        )
    check_scale("scale", scale)
    if input_scale is None:
        return
    channels = (x.shape[1 if x.ndim == 4 else -1],)
    if input_scale.shape != channels or input_scale.dtype != torch.float32:
        raise ValueError(
            f"input_scale has shape {tuple(input_scale.shape)} and dtype {input_scale.dtype}; accepted: a float32 "
            f"{tuple(channels)}, one per channel, or None"
        )
    check_same_device("x", x, input_scale=input_scale)
