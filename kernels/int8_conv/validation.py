"""What ``int8_conv`` accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.int8_conv.shape import out_shape
from catimage_accel.kernels.int8_linear.validation import MOST_PRODUCTS, validate_residual, validate_rest
from catimage_accel.kernels.validation import check_same_device


def validate(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if x.ndim != 4 or x.dtype != torch.int8 or x.shape[1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "accepted: an int8 (batch, in_channels, height, width) tensor with in_channels of at least 1"
        )
    channels = x.shape[1]
    products = weight.numel() // max(1, weight.shape[0]) if weight.ndim else 0
    if (
        weight.ndim != 4
        or weight.dtype != torch.int8
        or weight.shape[1] != channels
        or not 1 <= products <= MOST_PRODUCTS
        or weight.shape[0] == 0
    ):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; accepted: an int8 (out_channels, "
            f"{channels}, kernel height, kernel width) tensor with filters of 1 to {MOST_PRODUCTS} numbers"
        )
    check_same_device("x", x, weight=weight)
    if stride < 1:
        raise ValueError(f"stride is {stride}; accepted: a whole number from 1")
    if padding < 0:
        raise ValueError(f"padding is {padding}; accepted: a whole number from 0")
    shape = out_shape(x, weight, stride, padding)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted for weight of shape {tuple(weight.shape)} and padding {padding}: "
            "images that hold the kernel at least once"
        )
    validate_rest(x, weight, x_scale, weight_scale, bias, out_dtype, output_scale)
    validate_residual(x, shape, residual)
