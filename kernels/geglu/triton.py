"""The Triton kernel of ``geglu``: one pass, every value read and written once."""

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
def geglu_kernel(
    x_ptr,  # (rows, 2 * width): values, then gates
    y_ptr,  # (rows, width), int8 if QUANTIZED
    rows,
    width,
    column_blocks,
    inverse_output_scale,
    QUANTIZED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    column = (program % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = (program // column_blocks).to(tl.int64) * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_ROWS)
    mask = (lane < rows - first)[:, None] & (column < width)[None, :]
    x_ptr += first * (2 * width)
    y_ptr += first * width
    pointers = x_ptr + lane[:, None] * (2 * width) + column[None, :]
    value = tl.load(pointers, mask, 0.0).to(tl.float32)
    gate = tl.load(pointers + width, mask, 0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    if QUANTIZED:
        y = round_to_levels(y, inverse_output_scale)
    tl.store(y_ptr + lane[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask)


def geglu_op(x: Tensor, output_scale: float | None = None) -> Tensor:
    """See :func:`catimage_accel.kernels.geglu`."""
    x = x.contiguous()
    y = _fake(x, output_scale)
    if y.numel() == 0:
        return y
    width = y.shape[-1]
    rows = y.numel() // width
    config = launch_config("geglu", x.device, width=width)
    column_blocks = triton.cdiv(width, config["BLOCK_COLUMNS"])
    wrap_triton(geglu_kernel)[(triton.cdiv(rows, config["BLOCK_ROWS"]) * column_blocks,)](
        x, y, rows, width, column_blocks, 1.0 if output_scale is None else 1.0 / output_scale,
        QUANTIZED=output_scale is not None, **config,
    )  # fmt: skip
    return y


def _fake(x: Tensor, output_scale: float | None = None) -> Tensor:
    dtype = x.dtype if output_scale is None else torch.int8
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype, device=x.device)


_op = register_triton_op("geglu", geglu_op, _fake)


def geglu(x: Tensor, output_scale: float | None) -> Tensor:
    """See :func:`catimage_accel.kernels.geglu`; arguments are validated already."""
    y: Tensor = _op(x, None if output_scale is None else float(output_scale))
    return y
