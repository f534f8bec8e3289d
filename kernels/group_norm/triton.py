"""The Triton kernels of ``group_norm``.

A group is cut into chunks, so that a few groups still fill the device: (1) the moments kernels write each chunk's mean
and centred sum of squares, (2) ``combine_kernel`` merges them in a fixed order (Chan et al. 1983), (3) the apply
kernels normalise. The cuts depend on the shape of one image only. Inside a chunk every lane runs Welford's update, so
nothing is ever the difference of two large sums. A mean is kept as a float32 and the rounding it lost: where the mean
is many standard deviations, its last bit is what the result's error comes from.
"""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from catimage_accel.kernels.dispatch import register_triton_op
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def move_mean(mean, low, step):
    """``mean + low + step`` as a new such pair (Dekker's fast two-sum)."""
    step += low
    moved = mean + step
    return moved, step - (moved - mean)


@triton.jit
def merge_lanes(count, mean, low, squares, axis: tl.constexpr):
    """Mean, its rounding and the centred sum of squares over an axis of lanes that hold the same and a count."""
    total = tl.sum(count, axis)
    rough = tl.sum(count * mean, axis) / total
    rest = tl.sum(count * (mean - tl.expand_dims(rough, axis) + low), axis) / total
    merged, merged_low = move_mean(rough, 0.0, rest)
    delta = (mean - tl.expand_dims(merged, axis)) + (low - tl.expand_dims(merged_low, axis))
    return merged, merged_low, tl.sum(squares + count * delta * delta, axis)


@triton.jit
def activate(y, SILU: tl.constexpr):
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def moments_nchw_kernel(
    x_ptr,  # (batch * groups, size)
    partials_ptr,  # (3, batch * groups * chunks) float32: mean, its rounding, centred sum of squares
    size,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program % chunks) * CHUNK
    x_ptr += (program // chunks).to(tl.int64) * size
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        offset = first + step + tl.arange(0, BLOCK)
        mask = offset < size
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        count += mask.to(tl.float32)
        delta = tl.where(mask, x - mean - low, 0.0)
        mean, low = move_mean(mean, low, delta / tl.maximum(count, 1.0))
        squares += delta * (x - mean - low)
    chunk_mean, chunk_low, chunk_squares = merge_lanes(count, mean, low, squares, 0)
    plane = tl.num_programs(0)
    tl.store(partials_ptr + program, chunk_mean)
    tl.store(partials_ptr + plane + program, chunk_low)
    tl.store(partials_ptr + 2 * plane + program, chunk_squares)


@triton.jit
def moments_nhwc_kernel(
    x_ptr,  # (batch, pixels, channels)
    partials_ptr,  # (3, batch * groups * chunks * group_channels) float32, as above
    pixels,
    channels,
    groups,
    chunks,
    channel_blocks,
    plane,  # batch * groups * chunks * group_channels
    CHUNK: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    channel = (program % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    chunk = program // channel_blocks % chunks
    image = (program // channel_blocks // chunks).to(tl.int64)
    in_channels = channel < channels
    lane = tl.arange(0, BLOCK_PIXELS)
    x_ptr += (image * pixels + chunk * CHUNK) * channels
    pointers = x_ptr + lane[:, None] * channels + channel[None, :]
    left = pixels - chunk * CHUNK
    count = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    mean = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    low = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for step in range(0, tl.minimum(left, CHUNK), BLOCK_PIXELS):
        in_pixels = (lane < left - step)[:, None]
        x = tl.load(pointers, in_pixels & in_channels[None, :], 0.0).to(tl.float32)
        count += in_pixels.to(tl.float32)
        delta = tl.where(in_pixels, x - mean - low, 0.0)
        mean, low = move_mean(mean, low, delta / tl.maximum(count, 1.0))
        squares += delta * (x - mean - low)
        pointers += BLOCK_PIXELS * channels
    chunk_mean, chunk_low, chunk_squares = merge_lanes(count, mean, low, squares, 0)
    group_channels = channels // groups
    partials_ptr += ((image * groups + channel // group_channels) * chunks + chunk) * group_channels
    partials_ptr += channel % group_channels
    tl.store(partials_ptr, chunk_mean, in_channels)
    tl.store(partials_ptr + plane, chunk_low, in_channels)
    tl.store(partials_ptr + 2 * plane, chunk_squares, in_channels)


@triton.jit
def combine_kernel(
    partials_ptr,  # (3, batch * groups, chunks, width) float32: mean, its rounding, centred sum of squares
    moments_ptr,  # (3, batch * groups) float32: mean, its rounding, 1 / sqrt(variance + eps)
    size,  # values a chunk column covers in all
    chunks,
    width,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    entries = chunks * width
    plane = tl.num_programs(0).to(tl.int64) * entries
    partials_ptr += group.to(tl.int64) * entries
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < entries
        new_count = tl.where(mask, tl.minimum(size - entry // width * CHUNK, CHUNK), 0).to(tl.float32)
        new_mean = tl.load(partials_ptr + entry, mask, 0.0)
        new_low = tl.load(partials_ptr + plane + entry, mask, 0.0)
        delta = tl.where(mask, (new_mean - mean) + (new_low - low), 0.0)
        share = new_count / tl.maximum(count + new_count, 1.0)
        squares += tl.load(partials_ptr + 2 * plane + entry, mask, 0.0) + delta * delta * count * share
        mean, low = move_mean(mean, low, delta * share)
        count += new_count
    group_mean, group_low, group_squares = merge_lanes(count, mean, low, squares, 0)
    variance = group_squares / tl.sum(count, 0)
    tl.store(moments_ptr + group, group_mean)
    groups = tl.num_programs(0)
    tl.store(moments_ptr + groups + group, group_low)
    tl.store(moments_ptr + 2 * groups + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply_nchw_kernel(
    x_ptr,  # (batch * groups, size)
    weight_ptr,  # (channels,), read if HAS_WEIGHT
    bias_ptr,  # (channels,), read if HAS_BIAS
    moments_ptr,  # (3, batch * groups) float32
    y_ptr,  # (batch * groups, size)
    size,
    pixels,
    groups,
    blocks,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    base = row.to(tl.int64) * size
    x = tl.load(x_ptr + base + offset, mask, 0.0).to(tl.float32)
    rows = tl.num_programs(0) // blocks
    centred = (x - tl.load(moments_ptr + row)) - tl.load(moments_ptr + rows + row)
    y = centred * tl.load(moments_ptr + 2 * rows + row)
    channel = (row % groups) * (size // pixels) + offset // pixels
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + base + offset, activate(y, SILU).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def apply_nhwc_kernel(
    x_ptr,  # (batch, pixels, channels)
    weight_ptr,  # (channels,), read if HAS_WEIGHT
    bias_ptr,  # (channels,), read if HAS_BIAS
    moments_ptr,  # (3, batch * groups) float32
    y_ptr,  # (batch, pixels, channels)
    pixels,
    channels,
    groups,
    rows,  # batch * groups
    pixel_blocks,
    channel_blocks,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
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
    row = image * groups + channel // (channels // groups)
    mean = tl.load(moments_ptr + row, in_channels, 0.0)
    low = tl.load(moments_ptr + rows + row, in_channels, 0.0)
    inverse_std = tl.load(moments_ptr + 2 * rows + row, in_channels, 0.0)
    y = ((x - mean[None, :]) - low[None, :]) * inverse_std[None, :]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, in_channels, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, in_channels, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + base + offset, activate(y, SILU).to(y_ptr.dtype.element_ty), mask)


def group_norm_op(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`."""
    x = _dense(x)
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        return y
    pixels = x.numel() // (batch * channels)
    rows = batch * num_groups
    group_channels = channels // num_groups
    moments = torch.empty((3, rows), dtype=torch.float32, device=x.device)
    affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    nhwc = not x.is_contiguous()
    config = launch_config("group_norm", x.device, channels_last=1 + nhwc, pixels=pixels)
    chunk, warps = config["CHUNK"], config["num_warps"]
    if nhwc:
        tile = {"BLOCK_PIXELS": config["BLOCK_PIXELS"], "BLOCK_CHANNELS": config["BLOCK_CHANNELS"]}
        chunks = triton.cdiv(pixels, chunk)
        channel_blocks = triton.cdiv(channels, tile["BLOCK_CHANNELS"])
        pixel_blocks = triton.cdiv(pixels, tile["BLOCK_PIXELS"])
        plane = rows * chunks * group_channels
        partials = torch.empty((3, plane), dtype=torch.float32, device=x.device)
        wrap_triton(moments_nhwc_kernel)[(batch * chunks * channel_blocks,)](
            x, partials, pixels, channels, num_groups, chunks, channel_blocks, plane,
            CHUNK=chunk, num_warps=warps, **tile,
        )  # fmt: skip
        wrap_triton(combine_kernel)[(rows,)](
            partials, moments, pixels, chunks, group_channels, eps, CHUNK=chunk, BLOCK=config["COMBINE"], num_warps=4
        )
        wrap_triton(apply_nhwc_kernel)[(batch * pixel_blocks * channel_blocks,)](
            x, weight, bias, moments, y, pixels, channels, num_groups, rows, pixel_blocks, channel_blocks,
            num_warps=warps, **affine, **tile,
        )  # fmt: skip
        return y
    size, block = pixels * group_channels, config["BLOCK"]
    chunks = triton.cdiv(size, chunk)
    blocks = triton.cdiv(size, block)
    partials = torch.empty((3, rows * chunks), dtype=torch.float32, device=x.device)
    wrap_triton(moments_nchw_kernel)[(rows * chunks,)](
        x, partials, size, chunks, CHUNK=chunk, BLOCK=block, num_warps=warps
    )
    wrap_triton(combine_kernel)[(rows,)](
        partials, moments, size, chunks, 1, eps, CHUNK=chunk, BLOCK=config["COMBINE"], num_warps=4
    )
    wrap_triton(apply_nchw_kernel)[(rows * blocks,)](
        x, weight, bias, moments, y, size, pixels, num_groups, blocks, BLOCK=block, num_warps=warps, **affine
    )
    return y


def _fake(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(_dense(x))


def _dense(x: Tensor) -> Tensor:
    """``x`` itself where it is dense in NC... or N...C order, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


_op = register_triton_op("group_norm", group_norm_op, _fake)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, activation: str | None
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`; arguments are validated already."""
    y: Tensor = _op(x, num_groups, weight, bias, float(eps), activation == "silu")
    return y
