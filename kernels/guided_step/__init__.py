"""``guided_step``: classifier-free guidance and the sampler's update in one pass."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.guided_step import reference
from catimage_accel.kernels.guided_step.validation import validate

__all__ = ["guided_step"]


def guided_step(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None = None,
    *,
    guidance_scale: float | Tensor,
    guidance_rescale: float | Tensor = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One denoising step of N images, each with its own row of sampler coefficients.

    ::

        eps      = uncond + guidance_scale * (cond - uncond)
        eps      = guidance_rescale * eps * std(cond) / std(eps) + (1 - guidance_rescale) * eps
        denoised = p * sample + q * eps
        next     = s * sample + e * eps + h * history

    The standard deviations are per image, over channels and pixels (arXiv 2305.08891, section 3.4). All of it is
    computed in float32 (the reference: in float64 for a float64 sample).

    Args:
        sample: Latents, (N, C, height, width), any floating-point dtype.
        noise_cond: The UNet's output for the prompts, shape of ``sample``; its dtype may differ.
        noise_uncond: The UNet's output for the negative prompts, shape and dtype of ``noise_cond``; ``None`` means no
            guidance: ``eps = noise_cond``, ``guidance_scale`` and ``guidance_rescale`` have no effect.
        coefficients: (N, 5) float32, each row ``[s, e, h, p, q]``.
        history: The previous step's ``denoised``, shape and dtype of ``sample``; ``None`` means zeros.
        guidance_scale: One finite number, or an (N,) tensor.
        guidance_rescale: 0 (off) to 1, or an (N,) tensor of such numbers (not looked into).
        impl: "reference", "triton" or ``None``, the best available. Where a gradient is needed the reference runs.

    Returns:
        ``(next, denoised)`` with the shape and dtype of ``sample``.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(sample, noise_cond, noise_uncond, coefficients, history, guidance_scale, guidance_rescale)
    chosen = choose_impl(impl, "sample", sample, noise_cond, noise_uncond, history)
    if chosen == "triton":
        from catimage_accel.kernels.guided_step import triton

        return triton.guided_step(
            sample, noise_cond, noise_uncond, coefficients, history,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
        )  # fmt: skip
    return reference.guided_step(
        sample, noise_cond, noise_uncond, coefficients, history,
        guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
    )  # fmt: skip
