"""``int8_conv``: a 2-D convolution on INT8 activations and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.int8_conv import reference
from catimage_accel.kernels.int8_conv.validation import validate

__all__ = ["int8_conv"]


def int8_conv(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    output_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """``conv2d(x, weight) * x_scale * weight_scale + bias + residual``, optionally quantized again.

    The integer sums are exact (int32); the rest is float32, rounded once to ``out_dtype``. Padding is with zeros;
    dilation and groups are 1. No matrix of image patches is ever stored.

    Args:
        x: (batch, in_channels, height, width) int8; best in channels-last memory, others are copied into it;
            in_channels * kernel height * kernel width up to 131,071, so that int32 holds every sum.
        weight: (out_channels, in_channels, kernel height, kernel width) int8, device of ``x``; memory as of ``x``.
        x_scale: The real value of one level of ``x``, amax / 127; above 0.
        weight_scale: (out_channels,) float32, device of ``x``: the same of each of ``weight``'s filters.
        bias: (out_channels,), float16, bfloat16 or float32, device of ``x``; ``None`` for zeros.
        stride: Pixels from one result to the next, along both sides; 1 or more.
        padding: Rows and columns of zeros on every side; 0 or more.
        residual: (batch, out_channels, out height, out width), dtypes as of ``bias``; ``None`` adds nothing.
        out_dtype: float16, bfloat16, float32 or int8; the reference also takes float64, for exact results.
        output_scale: With an ``out_dtype`` of int8 (which needs it) the result is its levels, as of ``int8_quantize``;
            with another, the real values of these levels. ``None`` quantizes nothing.
        impl: "reference", "triton" or ``None``, the best available.

    Returns:
        (batch, out_channels, out height, out width) in channels-last memory, ``out_dtype``. There is no gradient.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(x, weight, x_scale, weight_scale, bias, stride, padding, residual, out_dtype, output_scale)
    if impl == "triton" and out_dtype == torch.float64:
        raise ValueError("out_dtype is torch.float64; accepted by impl 'reference' only")
    chosen = choose_impl(impl, "x", x, weight_scale, bias, residual, triton_dtypes=(torch.int8,))
    arguments = (x, weight, x_scale, weight_scale, bias, stride, padding, residual, out_dtype, output_scale)
    if chosen == "triton" and out_dtype != torch.float64:
        from catimage_accel.kernels.int8_conv import triton

        return triton.int8_conv(*arguments)
    return reference.int8_conv(*arguments)
