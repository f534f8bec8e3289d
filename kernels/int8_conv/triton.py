"""The Triton kernel of ``int8_conv``: an implicit matrix product, (pixels, taps * channels) by (taps * channels, out).

The rows of the left matrix are read from the image where they lie, one tap of the kernel and one block of channels at
a time; what a tap finds outside of the image is zero.
"""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.int8_conv.shape import out_shape, tuned_shape
from catimage_accel.kernels.int8_linear.epilogue import store_result, tile_of
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def int8_conv_kernel(
    x_ptr,  # (batch, height, width, channels) int8
    weight_ptr,  # (out_channels, kernel height, kernel width, channels) int8
    weight_scale_ptr,  # (out_channels,) float32
    bias_ptr,  # (out_channels,), read if HAS_BIAS
    residual_ptr,  # (rows, out_channels), read if HAS_RESIDUAL
    out_ptr,  # (rows, out_channels)
    rows,  # batch * out_height * out_width
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    padding,
    x_scale,
    output_scale,
    inverse_output_scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,  # channels is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_channels, BLOCK_N), GROUP
    )  # fmt: skip
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < rows, (column < out_channels)[:, None]
    pixel = row % (out_height * out_width)
    top = pixel // out_width * STRIDE - padding
    left = pixel % out_width * STRIDE - padding
    image = (row // (out_height * out_width)).to(tl.int64)
    # Of the kernel's first tap, which may be outside of the image: then it is not read.
    corner = (image * height + top) * width + left
    x_pointers = x_ptr + corner[:, None] * channels + lane[None, :]
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    weight_pointers = weight_ptr + column.to(tl.int64)[:, None] * (TAPS * channels) + lane[None, :]
    channel_blocks = tl.cdiv(channels, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for step in range(TAPS * channel_blocks):
        tap = step // channel_blocks
        first = step % channel_blocks * BLOCK_K
        down, across = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
        y, x = top + down, left + across
        inside = (in_rows & (y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        step_pointers = x_pointers + ((down * width + across) * channels + first)
        if EVEN_K:
            values = tl.load(step_pointers, inside, 0)
            weight = tl.load(weight_pointers + (tap * channels + first), in_columns, 0)
        else:
            channels_left = (lane < channels - first)[None, :]
            values = tl.load(step_pointers, inside & channels_left, 0)
            weight = tl.load(weight_pointers + (tap * channels + first), in_columns & channels_left, 0)
        sums = tl.dot(values, tl.trans(weight), sums, out_dtype=tl.int32)
    store_result(
        sums, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr, row, column, rows, out_channels,
        x_scale, output_scale, inverse_output_scale, HAS_BIAS, HAS_RESIDUAL, QUANTIZED,
    )  # fmt: skip


def int8_conv_op(
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
    out = _fake(x, weight, x_scale, weight_scale, bias, stride, padding, residual, out_dtype, output_scale)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    channels, height, width = x.shape[1:]
    batch, out_channels, out_height, out_width = out.shape
    rows = batch * out_height * out_width
    config = launch_config("int8_conv", x.device, **tuned_shape((batch, out_channels, out_height, out_width), weight))
    blocks = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_channels, config["BLOCK_N"])
    scale = 1.0 if output_scale is None else output_scale
    wrap_triton(int8_conv_kernel)[(blocks,)](
        x, weight, weight_scale.contiguous(),
        weight_scale if bias is None else bias.contiguous(),
        weight_scale if residual is None else residual.contiguous(memory_format=torch.channels_last),
        out, rows, height, width, channels, out_height, out_width, out_channels, padding,
        x_scale, scale, 1.0 / scale,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, QUANTIZED=output_scale is not None,
        STRIDE=stride, KERNEL_HEIGHT=weight.shape[2], KERNEL_WIDTH=weight.shape[3],
        EVEN_K=channels % config["BLOCK_K"] == 0, **config,
    )  # fmt: skip
    return out


def _fake(
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
    shape = out_shape(x, weight, stride, padding)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


_op = register_triton_op("int8_conv", int8_conv_op, _fake)


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
    """See :func:`catimage_accel.kernels.int8_conv`; arguments are validated already."""
    scale = None if output_scale is None else float(output_scale)
    out: Tensor = _op(x, weight, float(x_scale), weight_scale, bias, stride, padding, residual, out_dtype, scale)
    return out
