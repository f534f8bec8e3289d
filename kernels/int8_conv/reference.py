"""The definition of ``int8_conv``, through torch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catimage_accel.kernels.int8_linear.reference import finish


def int8_conv(
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
) -> Tensor:
    """See :func:`catimage_accel.kernels.int8_conv`."""
    # Exact: whole numbers below 2^53, and no algorithm for float64 transforms its input.
    product = F.conv2d(x.double(), weight.double(), stride=stride, padding=padding)
    last = None if residual is None else residual.permute(0, 2, 3, 1)
    y = finish(product.permute(0, 2, 3, 1), x_scale, weight_scale, bias, last, out_dtype, output_scale)
    return y.contiguous().permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
