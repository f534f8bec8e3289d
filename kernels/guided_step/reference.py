"""The definition of ``guided_step`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_step(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None = None,
    *,
    guidance_scale: float | Tensor,
    guidance_rescale: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`catimage_accel.kernels.guided_step`; computes in float32 (float64 for a float64 sample)."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    x = sample.to(dtype)
    s, e, h, p, q = (column.reshape(-1, 1, 1, 1) for column in coefficients.to(dtype).unbind(1))
    eps = cond = noise_cond.to(dtype)
    if noise_uncond is not None:
        if isinstance(guidance_scale, Tensor):
            guidance_scale = guidance_scale.to(dtype).reshape(-1, 1, 1, 1)
        uncond = noise_uncond.to(dtype)
        eps = uncond + guidance_scale * (cond - uncond)
        if isinstance(guidance_rescale, Tensor):
            rescale = guidance_rescale.to(dtype).reshape(-1, 1, 1, 1)
            eps = torch.where(rescale == 0, eps, rescaled(eps, cond, rescale))
        elif guidance_rescale != 0.0:
            eps = rescaled(eps, cond, guidance_rescale)
    denoised = p * x + q * eps
    next_sample = s * x + e * eps
    if history is not None:
        next_sample = next_sample + h * history.to(dtype)
    return next_sample.to(sample.dtype), denoised.to(sample.dtype)


def rescaled(eps: Tensor, cond: Tensor, rescale: float | Tensor) -> Tensor:
    """``eps`` with its standard deviation drawn by ``rescale`` to that of ``cond``, image by image."""
    return eps * (1.0 + rescale * (_row_std(cond) / _row_std(eps) - 1.0))


def _row_std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)
