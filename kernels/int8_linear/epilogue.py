"""What the Triton kernels of INT8 products do with their int32 sums, and in which order they visit the tiles."""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl

from catimage_accel.kernels.int8_quantize.triton import round_to_levels


@triton.jit
def tile_of(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column block of a program: GROUP blocks of rows at a time, so that what they share stays in the cache."""
    in_group = GROUP * column_blocks
    first = program // in_group * GROUP
    rows = tl.minimum(row_blocks - first, GROUP)
    return first + program % in_group % rows, program % in_group // rows


@triton.jit
def store_result(
    sums,  # (BLOCK_M, BLOCK_N) int32
    weight_scale_ptr,  # (columns,) float32
    bias_ptr,  # (columns,), read if HAS_BIAS
    residual_ptr,  # (rows, columns), read if HAS_RESIDUAL
    out_ptr,  # (rows, columns)
    row,  # (BLOCK_M,)
    column,  # (BLOCK_N,)
    rows,
    columns,
    x_scale,
    output_scale,
    inverse_output_scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    in_columns = column < columns
    mask = (row < rows)[:, None] & in_columns[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    y = sums.to(tl.float32) * (tl.load(weight_scale_ptr + column, in_columns, 0.0) * x_scale)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, in_columns, 0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offset, mask, 0.0).to(tl.float32)
    if QUANTIZED:
        y = round_to_levels(y, inverse_output_scale)
        if out_ptr.dtype.element_ty != tl.int8:
            y *= output_scale
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask)
