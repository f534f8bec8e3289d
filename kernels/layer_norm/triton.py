"""The Triton kernel of ``layer_norm``: a row stays in registers, so that every value is read once.

The mean is corrected by the mean of what it leaves: where it is many standard deviations, its last bit is what the
result's error comes from.
"""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.int8_quantize.triton import round_to_levels
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def layer_norm_kernel(
    x_ptr,  # (rows, width)
    residual_ptr,  # (rows, width), read if HAS_RESIDUAL
    weight_ptr,  # (width,), read if HAS_WEIGHT
    bias_ptr,  # (width,), read if HAS_BIAS
    y_ptr,  # (rows, width), int8 if QUANTIZED
    total_ptr,  # (rows, width), x + residual, written if HAS_RESIDUAL
    rows,
    width,
    eps,
    inverse_output_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # covers width
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    in_columns = (column < width)[None, :]
    mask = (lane < rows - first)[:, None] & in_columns
    base = first * width
    offset = lane[:, None] * width + column[None, :]
    x = tl.load(x_ptr + base + offset, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + base + offset, mask, 0.0).to(tl.float32)
        tl.store(total_ptr + base + offset, x.to(total_ptr.dtype.element_ty), mask)
    mean = tl.sum(x, 1) / width
    centred = tl.where(in_columns, x - mean[:, None], 0.0)
    correction = tl.sum(centred, 1) / width
    centred = tl.where(in_columns, centred - correction[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    y = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if QUANTIZED:
        y = round_to_levels(y, inverse_output_scale)
    tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    x = x.contiguous()
    y = _fake(x, weight, bias, eps, output_scale)
    total = None if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, total
    width = x.shape[-1]
    rows = x.numel() // width
    config = launch_config("layer_norm", x.device, width=width)
    wrap_triton(layer_norm_kernel)[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
        x,
        x if residual is None else residual.contiguous(),
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        y, x if total is None else total, rows, width, eps,
        1.0 if output_scale is None else 1.0 / output_scale, QUANTIZED=output_scale is not None,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCK_WIDTH=triton.next_power_of_2(width), **config,
    )  # fmt: skip
    return y, total


def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None = None
) -> Tensor:
    """See :func:`catimage_accel.kernels.layer_norm`."""
    return _launch(x, None, weight, bias, eps, output_scale)[0]


def add_layer_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`catimage_accel.kernels.layer_norm`: the normalised sum, and the sum."""
    y, total = _launch(x, residual, weight, bias, eps, output_scale)
    assert total is not None
    return y, total


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None = None
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype if output_scale is None else torch.int8, device=x.device)


def _fake_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return _fake(x, weight, bias, eps, output_scale), _fake(x, weight, bias, eps)


_op = register_triton_op("layer_norm", layer_norm_op, _fake)
_add_op = register_triton_op("add_layer_norm", add_layer_norm_op, _fake_add)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None) -> Tensor:
    """See :func:`catimage_accel.kernels.layer_norm`; arguments are validated already."""
    y: Tensor = _op(x, weight, bias, float(eps), None if output_scale is None else float(output_scale))
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None
) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum; arguments are validated already."""
    scale = None if output_scale is None else float(output_scale)
    y, total = _add_op(x, residual, weight, bias, float(eps), scale)
    return y, total
