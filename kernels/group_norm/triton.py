"""The Triton kernels of ``group_norm``.

A group is cut into chunks, so that a few groups still fill the device: (1) the moments kernels write each chunk's mean
and centred sum of squares, (2) ``combine_kernel`` merges them in a fixed order (Chan et al. 1983), (3) the apply
kernels normalise. The cuts depend on the shape of one image only. A shift is added in float32 wherever ``x`` is read,
so that the sum is never stored.
"""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.group_norm.layout import is_dense, tuned_shape
from catimage_accel.kernels.group_norm.triton_moments import combine_kernel, moments_nchw_kernel, moments_nhwc_kernel
from catimage_accel.kernels.int8_quantize.triton import round_to_levels
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def finish(y, inverse_output_scale, SILU: tl.constexpr, QUANTIZED: tl.constexpr):
    if SILU:
        y = y * tl.sigmoid(y)
    if QUANTIZED:
        y = round_to_levels(y, inverse_output_scale)
    return y


@triton.jit
def apply_nchw_kernel(
    x_ptr,  # (batch * groups, size)
    shift_ptr,  # (batch, channels), read if HAS_SHIFT
    weight_ptr,  # (channels,), read if HAS_WEIGHT
    bias_ptr,  # (channels,), read if HAS_BIAS
    moments_ptr,  # (3, batch * groups) float32
    y_ptr,  # (batch * groups, size), int8 if QUANTIZED
    size,
    pixels,
    groups,
    blocks,
    inverse_output_scale,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    base = row.to(tl.int64) * size
    x = tl.load(x_ptr + base + offset, mask, 0.0).to(tl.float32)
    group_channels = size // pixels
    if HAS_SHIFT:
        x += tl.load(shift_ptr + row * group_channels + offset // pixels, mask, 0.0).to(tl.float32)
    rows = tl.num_programs(0) // blocks
    centred = (x - tl.load(moments_ptr + row)) - tl.load(moments_ptr + rows + row)
    y = centred * tl.load(moments_ptr + 2 * rows + row)
    channel = (row % groups) * group_channels + offset // pixels
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask, 0.0).to(tl.float32)
    y = finish(y, inverse_output_scale, SILU, QUANTIZED)
    tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def apply_nhwc_kernel(
    x_ptr,  # (batch, pixels, channels)
    shift_ptr,  # (batch, channels), read if HAS_SHIFT
    weight_ptr,  # (channels,), read if HAS_WEIGHT
    bias_ptr,  # (channels,), read if HAS_BIAS
    moments_ptr,  # (3, batch * groups) float32
    y_ptr,  # (batch, pixels, channels), int8 if QUANTIZED
    pixels,
    channels,
    groups,
    rows,  # batch * groups
    pixel_blocks,
    channel_blocks,
    inverse_output_scale,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    channel = (program % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel_block = program // channel_blocks % pixel_blocks
    image = program // channel_blocks // pixel_blocks
    in_channels = channel < channels
    lane = tl.arange(0, BLOCK_PIXELS)
    mask = (lane < pixels - pixel_block * BLOCK_PIXELS)[:, None] & in_channels[None, :]
    base = (image.to(tl.int64) * pixels + pixel_block * BLOCK_PIXELS) * channels
    offset = lane[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + base + offset, mask, 0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift_ptr + image * channels + channel, in_channels, 0.0).to(tl.float32)[None, :]
    row = image * groups + channel // (channels // groups)
    mean = tl.load(moments_ptr + row, in_channels, 0.0)
    low = tl.load(moments_ptr + rows + row, in_channels, 0.0)
    inverse_std = tl.load(moments_ptr + 2 * rows + row, in_channels, 0.0)
    y = ((x - mean[None, :]) - low[None, :]) * inverse_std[None, :]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, in_channels, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, in_channels, 0.0).to(tl.float32)[None, :]
    y = finish(y, inverse_output_scale, SILU, QUANTIZED)
    tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask)


def group_norm_op(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    output_scale: float | None = None,
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`."""
    x = x if is_dense(x) else x.contiguous()
    y = _fake(x, num_groups, weight, bias, eps, silu, shift, output_scale)
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        return y
    pixels = x.numel() // (batch * channels)
    rows = batch * num_groups
    group_channels = channels // num_groups
    moments = torch.empty((3, rows), dtype=torch.float32, device=x.device)
    has_shift = shift is not None
    flags = {"HAS_SHIFT": has_shift, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    flags["QUANTIZED"] = output_scale is not None
    inverse_output_scale = 1.0 if output_scale is None else 1.0 / output_scale
    shift = x if shift is None else shift.contiguous()
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    nhwc = not x.is_contiguous()
    config = launch_config("group_norm", x.device, **tuned_shape(x))
    chunk, warps = config["CHUNK"], config["num_warps"]
    if nhwc:
        tile = {"BLOCK_PIXELS": config["BLOCK_PIXELS"], "BLOCK_CHANNELS": config["BLOCK_CHANNELS"]}
        chunks = triton.cdiv(pixels, chunk)
        channel_blocks = triton.cdiv(channels, tile["BLOCK_CHANNELS"])
        pixel_blocks = triton.cdiv(pixels, tile["BLOCK_PIXELS"])
        plane = rows * chunks * group_channels
        partials = torch.empty((3, plane), dtype=torch.float32, device=x.device)
        wrap_triton(moments_nhwc_kernel)[(batch * chunks * channel_blocks,)](
            x, shift, partials, pixels, channels, num_groups, chunks, channel_blocks, plane,
            HAS_SHIFT=has_shift, CHUNK=chunk, num_warps=warps, **tile,
        )  # fmt: skip
        wrap_triton(combine_kernel)[(rows,)](
            partials, moments, pixels, chunks, group_channels, eps, CHUNK=chunk, BLOCK=config["COMBINE"], num_warps=4
        )
        wrap_triton(apply_nhwc_kernel)[(batch * pixel_blocks * channel_blocks,)](
            x, shift, weight, bias, moments, y, pixels, channels, num_groups, rows, pixel_blocks, channel_blocks,
            inverse_output_scale, num_warps=warps, **flags, **tile,
        )  # fmt: skip
        return y
    size, block = pixels * group_channels, config["BLOCK"]
    chunks = triton.cdiv(size, chunk)
    blocks = triton.cdiv(size, block)
    partials = torch.empty((3, rows * chunks), dtype=torch.float32, device=x.device)
    wrap_triton(moments_nchw_kernel)[(rows * chunks,)](
        x, shift, partials, size, pixels, chunks, HAS_SHIFT=has_shift, CHUNK=chunk, BLOCK=block, num_warps=warps
    )
    wrap_triton(combine_kernel)[(rows,)](
        partials, moments, size, chunks, 1, eps, CHUNK=chunk, BLOCK=config["COMBINE"], num_warps=4
    )
    wrap_triton(apply_nchw_kernel)[(rows * blocks,)](
        x, shift, weight, bias, moments, y, size, pixels, num_groups, blocks, inverse_output_scale,
        BLOCK=block, num_warps=warps, **flags,
    )  # fmt: skip
    return y


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    output_scale: float | None = None,
) -> Tensor:
    dtype = x.dtype if output_scale is None else torch.int8
    return torch.empty_like(x if is_dense(x) else x.contiguous(), dtype=dtype)


_op = register_triton_op("group_norm", group_norm_op, _fake)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str | None,
    shift: Tensor | None,
    output_scale: float | None,
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`; arguments are validated already."""
    scale = None if output_scale is None else float(output_scale)
    y: Tensor = _op(x, num_groups, weight, bias, float(eps), activation == "silu", shift, scale)
    return y
