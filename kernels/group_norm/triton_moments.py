"""The moments of ``group_norm``'s groups: what its Triton kernels compute first.

Inside a chunk every lane runs Welford's update, so nothing is ever the difference of two large sums. A mean is kept as
a float32 and the rounding it lost: where the mean is many standard deviations, its last bit is what the result's error
comes from.
"""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl


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
def moments_nchw_kernel(
    x_ptr,  # (batch * groups, size)
    shift_ptr,  # (batch, channels), read if HAS_SHIFT
    partials_ptr,  # (3, batch * groups * chunks) float32: mean, its rounding, centred sum of squares
    size,
    pixels,
    chunks,
    HAS_SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program % chunks) * CHUNK
    x_ptr += (program // chunks).to(tl.int64) * size
    shift_ptr += (program // chunks) * (size // pixels)
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        offset = first + step + tl.arange(0, BLOCK)
        mask = offset < size
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        if HAS_SHIFT:
            x += tl.load(shift_ptr + offset // pixels, mask, 0.0).to(tl.float32)
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
    shift_ptr,  # (batch, channels), read if HAS_SHIFT
    partials_ptr,  # (3, batch * groups * chunks * group_channels) float32, as above
    pixels,
    channels,
    groups,
    chunks,
    channel_blocks,
    plane,  # batch * groups * chunks * group_channels
    HAS_SHIFT: tl.constexpr,
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
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + image * channels + channel, in_channels, 0.0).to(tl.float32)[None, :]
    count = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    mean = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    low = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for step in range(0, tl.minimum(left, CHUNK), BLOCK_PIXELS):
        in_pixels = (lane < left - step)[:, None]
        x = tl.load(pointers, in_pixels & in_channels[None, :], 0.0).to(tl.float32)
        if HAS_SHIFT:
            x += shift
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
