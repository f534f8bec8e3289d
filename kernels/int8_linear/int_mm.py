"""``int8_linear`` by ``torch._int_mm`` (cuBLASLt on CUDA), with the rest in torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.int8_linear.reference import finish


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the shapes are ones that cuBLASLt takes."""
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    return rows > 16 and out_features % 8 == 0 and in_features % 8 == 0


def int8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> Tensor:
    """See :func:`catimage_accel.kernels.int8_linear`; arguments are validated already, and ``takes`` them."""
    product = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t()).reshape(*x.shape[:-1], weight.shape[0])
    return finish(product, x_scale, weight_scale, bias, residual, out_dtype, output_scale)
