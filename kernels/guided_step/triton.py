"""The Triton kernels of ``guided_step``: one pass, or two where guidance is rescaled."""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton

BLOCK = 1024


@triton.jit
def moments_kernel(
    cond_ptr,  # (rows, size)
    uncond_ptr,  # (rows, size)
    guidance_ptr,  # (rows,) float32
    partials_ptr,  # (4, rows * blocks) float32: mean and centred sum of squares of cond, then of the guided noise
    size,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    base = row.to(tl.int64) * size
    cond = tl.load(cond_ptr + base + offset, mask, 0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + base + offset, mask, 0.0).to(tl.float32)
    eps = uncond + tl.load(guidance_ptr + row) * (cond - uncond)
    count = tl.sum(mask.to(tl.float32))

    plane = tl.num_programs(0)
    cond_mean = tl.sum(cond) / count
    cond_centred = tl.where(mask, cond - cond_mean, 0.0)
    tl.store(partials_ptr + program, cond_mean)
    tl.store(partials_ptr + plane + program, tl.sum(cond_centred * cond_centred))
    eps_mean = tl.sum(eps) / count
    eps_centred = tl.where(mask, eps - eps_mean, 0.0)
    tl.store(partials_ptr + 2 * plane + program, eps_mean)
    tl.store(partials_ptr + 3 * plane + program, tl.sum(eps_centred * eps_centred))


@triton.jit
def sum_of_squares(mean_ptr, squares_ptr, first, size, blocks, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Centred sum of squares of a row from those of its blocks (Chan et al. 1983)."""
    block = tl.arange(0, LANES)
    mask = block < blocks
    count = tl.where(mask, tl.minimum(size - block * BLOCK, BLOCK), 0).to(tl.float32)
    mean = tl.load(mean_ptr + first + block, mask, 0.0)
    squares = tl.load(squares_ptr + first + block, mask, 0.0)
    delta = tl.where(mask, mean - tl.sum(count * mean) / size, 0.0)
    return tl.sum(squares + count * delta * delta)


@triton.jit
def step_kernel(
    sample_ptr,  # (rows, size)
    cond_ptr,  # (rows, size)
    uncond_ptr,  # (rows, size), read if GUIDED
    coefficients_ptr,  # (rows, 5) float32
    history_ptr,  # (rows, size), read if HAS_HISTORY
    guidance_ptr,  # (rows,) float32, read if GUIDED
    partials_ptr,  # (4, rows * blocks) float32, read if RESCALED
    next_ptr,  # (rows, size)
    denoised_ptr,  # (rows, size)
    rescale_ptr,  # (rows,) float32, read if RESCALED
    size,
    blocks,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    base = row.to(tl.int64) * size
    sample = tl.load(sample_ptr + base + offset, mask, 0.0).to(tl.float32)
    eps = tl.load(cond_ptr + base + offset, mask, 0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(uncond_ptr + base + offset, mask, 0.0).to(tl.float32)
        eps = uncond + tl.load(guidance_ptr + row) * (eps - uncond)
    if RESCALED:
        plane = tl.num_programs(0)
        first = row * blocks
        cond_squares = sum_of_squares(partials_ptr, partials_ptr + plane, first, size, blocks, BLOCK, LANES)
        eps_squares = sum_of_squares(
            partials_ptr + 2 * plane, partials_ptr + 3 * plane, first, size, blocks, BLOCK, LANES
        )
        rescale = tl.load(rescale_ptr + row)
        ratio = tl.sqrt(cond_squares / eps_squares)
        # A row that is not rescaled takes no harm from the NaN of a guided output without variance.
        eps = tl.where(rescale == 0.0, eps, eps * (1.0 + rescale * (ratio - 1.0)))

    row_coefficients = coefficients_ptr + row * 5
    next_sample = tl.load(row_coefficients) * sample + tl.load(row_coefficients + 1) * eps
    denoised = tl.load(row_coefficients + 3) * sample + tl.load(row_coefficients + 4) * eps
    if HAS_HISTORY:
        history = tl.load(history_ptr + base + offset, mask, 0.0).to(tl.float32)
        next_sample += tl.load(row_coefficients + 2) * history
    tl.store(next_ptr + base + offset, next_sample.to(next_ptr.dtype.element_ty), mask)
    tl.store(denoised_ptr + base + offset, denoised.to(denoised_ptr.dtype.element_ty), mask)


def guided_step_op(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None,
    guidance: Tensor | None,
    rescale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``guidance`` and ``rescale`` are (N,) float32; ``guidance`` is ``None`` exactly where ``noise_uncond`` is."""
    layout = _layout(sample)
    sample, noise_cond = sample.contiguous(memory_format=layout), noise_cond.contiguous(memory_format=layout)
    next_sample, denoised = torch.empty_like(sample), torch.empty_like(sample)
    rows, size = sample.shape[0], sample[0].numel() if sample.shape[0] else 0
    if rows * size == 0:
        return next_sample, denoised
    guided = noise_uncond is not None and guidance is not None
    uncond = noise_cond if noise_uncond is None else noise_uncond.contiguous(memory_format=layout)
    guidance = coefficients if guidance is None else guidance.contiguous()
    coefficients = coefficients.contiguous()
    blocks = triton.cdiv(size, BLOCK)
    rescaled = guided and rescale is not None
    rescale = coefficients if rescale is None else rescale.contiguous()
    partials = coefficients
    if rescaled:
        partials = torch.empty((4, rows * blocks), dtype=torch.float32, device=sample.device)
        wrap_triton(moments_kernel)[(rows * blocks,)](
            noise_cond, uncond, guidance, partials, size, blocks, BLOCK=BLOCK, num_warps=4
        )
    wrap_triton(step_kernel)[(rows * blocks,)](
        sample, noise_cond, uncond, coefficients,
        sample if history is None else history.contiguous(memory_format=layout),
        guidance, partials, next_sample, denoised, rescale, size, blocks,
        GUIDED=guided, RESCALED=rescaled, HAS_HISTORY=history is not None,
        BLOCK=BLOCK, LANES=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return next_sample, denoised


def _fake(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None,
    guidance: Tensor | None,
    rescale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sample = sample.contiguous(memory_format=_layout(sample))
    return torch.empty_like(sample), torch.empty_like(sample)


def _layout(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


_op = register_triton_op("guided_step", guided_step_op, _fake)


def guided_step(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None,
    *,
    guidance_scale: float | Tensor,
    guidance_rescale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`catimage_accel.kernels.guided_step`; arguments are validated already."""
    guidance = rescale = None
    if noise_uncond is not None:
        guidance = _by_row(guidance_scale, sample)
        if isinstance(guidance_rescale, Tensor) or guidance_rescale != 0.0:
            rescale = _by_row(guidance_rescale, sample)
    next_sample, denoised = _op(sample, noise_cond, noise_uncond, coefficients, history, guidance, rescale)
    return next_sample, denoised


def _by_row(value: float | Tensor, sample: Tensor) -> Tensor:
    """float32 (N,)"""
    if isinstance(value, Tensor):
        return value.float()
    return torch.full((sample.shape[0],), value, dtype=torch.float32, device=sample.device)
