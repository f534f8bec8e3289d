"""The Triton kernel of ``int8_linear``: INT8 tensor cores, int32 sums, and all that follows them in one pass."""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.int8_linear.epilogue import store_result, tile_of
from catimage_accel.kernels.int8_linear.shape import tuned_shape
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def int8_linear_kernel(
    x_ptr,  # (rows, in_features) int8
    weight_ptr,  # (out_features, in_features) int8
    weight_scale_ptr,  # (out_features,) float32
    bias_ptr,  # (out_features,), read if HAS_BIAS
    residual_ptr,  # (rows, out_features), read if HAS_RESIDUAL
    out_ptr,  # (rows, out_features)
    rows,
    out_features,
    in_features,
    x_scale,
    output_scale,
    inverse_output_scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP
    )  # fmt: skip
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (row < rows)[:, None], (column < out_features)[:, None]
    x_pointers = x_ptr + row.to(tl.int64)[:, None] * in_features + lane[None, :]
    weight_pointers = weight_ptr + column.to(tl.int64)[:, None] * in_features + lane[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for first in range(0, in_features, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_pointers, in_rows, 0)
            weight = tl.load(weight_pointers, in_columns, 0)
        else:
            in_features_left = (lane < in_features - first)[None, :]
            x = tl.load(x_pointers, in_rows & in_features_left, 0)
            weight = tl.load(weight_pointers, in_columns & in_features_left, 0)
        sums = tl.dot(x, tl.trans(weight), sums, out_dtype=tl.int32)
        x_pointers += BLOCK_K
        weight_pointers += BLOCK_K
    store_result(
        sums, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, row, column, rows, out_features,
        x_scale, output_scale, inverse_output_scale, HAS_BIAS, HAS_RESIDUAL, QUANTIZED,
    )  # fmt: skip


def int8_linear_op(
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
    out = _fake(x, weight, x_scale, weight_scale, bias, residual, out_dtype, output_scale)
    if out.numel() == 0:
        return out
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    config = launch_config("int8_linear", x.device, **tuned_shape(x, weight))
    blocks = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_features, config["BLOCK_N"])
    scale = 1.0 if output_scale is None else output_scale
    wrap_triton(int8_linear_kernel)[(blocks,)](
        x.contiguous(), weight.contiguous(), weight_scale.contiguous(),
        weight_scale if bias is None else bias.contiguous(),
        weight_scale if residual is None else residual.contiguous(),
        out, rows, out_features, in_features, x_scale, scale, 1.0 / scale,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, QUANTIZED=output_scale is not None,
        EVEN_K=in_features % config["BLOCK_K"] == 0, **config,
    )  # fmt: skip
    return out


def _fake(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    output_scale: float | None,
) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype, device=x.device)


_op = register_triton_op("int8_linear", int8_linear_op, _fake)


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
    """See :func:`catimage_accel.kernels.int8_linear`; arguments are validated already."""
    scale = None if output_scale is None else float(output_scale)
    out: Tensor = _op(x, weight, float(x_scale), weight_scale, bias, residual, out_dtype, scale)
    return out
