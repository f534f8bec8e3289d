"""What ``int8_linear`` accepts, and what every op accepts that multiplies INT8 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.dispatch import KERNEL_DTYPES
from catimage_accel.kernels.int8_quantize.scale import check_scale
from catimage_accel.kernels.validation import check_same_device

MOST_PRODUCTS = 2**17 - 1  # of -128 * -128, that int32 holds the sum of
OUT_DTYPES = (*KERNEL_DTYPES, torch.float64, torch.int8)


def validate(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if x.ndim < 1 or x.dtype != torch.int8 or not 1 <= x.shape[-1] <= MOST_PRODUCTS:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            f"accepted: an int8 (..., in_features) tensor with in_features of 1 to {MOST_PRODUCTS}"
        )
    if weight.ndim != 2 or weight.dtype != torch.int8 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
            f"accepted: an int8 (out_features, {x.shape[-1]}) tensor with out_features of at least 1"
        )
    check_same_device("x", x, weight=weight)
    validate_rest(x, weight, x_scale, weight_scale, bias, out_dtype, output_scale)
    validate_residual(x, (*x.shape[:-1], weight.shape[0]), residual)


def validate_rest(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> None:
    """What follows an integer product with ``weight`` (out, ...)."""
    check_scale("x_scale", x_scale)
    out = (weight.shape[0],)
    if weight_scale.shape != out or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_scale has shape {tuple(weight_scale.shape)} and dtype {weight_scale.dtype}; "
            f"accepted: a float32 {tuple(out)}, one per row of weight"
        )
    check_same_device("x", x, weight_scale=weight_scale)
    if bias is not None:
        if bias.shape != out:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; accepted: {tuple(out)}, one per row of weight, or None"
            )
        _check_added("bias", x, bias)
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; accepted: {', '.join(map(str, OUT_DTYPES))}")
    if output_scale is not None:
        check_scale("output_scale", output_scale)
    elif out_dtype == torch.int8:
        raise ValueError("output_scale is None; accepted with an out_dtype of torch.int8: a number above 0")


def validate_residual(x: Tensor, shape: tuple[int, ...], residual: Tensor | None) -> None:
    """``residual`` has the result's shape."""
    if residual is None:
        return
    if residual.shape != shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; accepted: the result's, {tuple(shape)}, or None"
        )
    _check_added("residual", x, residual)


def _check_added(name: str, x: Tensor, tensor: Tensor) -> None:
    # float64 is what exact results are computed from.
    if tensor.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {', '.join(map(str, KERNEL_DTYPES))}")
    check_same_device("x", x, **{name: tensor})
