"""The definition of ``int8_linear``, and of what follows an integer product, through torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import to_levels


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
    """See :func:`catimage_accel.kernels.int8_linear`."""
    product = x.double() @ weight.double().t()  # exact: whole numbers below 2^53
    return finish(product, x_scale, weight_scale, bias, residual, out_dtype, output_scale)


def finish(
    product: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> Tensor:
    """The real values of an integer product, channels last, with bias and residual; quantized again if asked.

    In float32, or float64 where that is the ``out_dtype``.
    """
    exact = torch.promote_types(out_dtype, torch.float32) if out_dtype.is_floating_point else torch.float32
    y = product.to(exact) * (weight_scale.to(exact) * x_scale)
    if bias is not None:
        y = y + bias.to(exact)
    if residual is not None:
        y = y + residual.to(exact)
    if output_scale is None:
        return y.to(out_dtype)
    levels = to_levels(y, output_scale)
    return (levels if out_dtype == torch.int8 else levels * output_scale).to(out_dtype)
