"""What ``guided_step`` accepts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from catimage_accel.kernels.validation import check_same_device


def validate(
    sample: Tensor,
    noise_cond: Tensor,
    noise_uncond: Tensor | None,
    coefficients: Tensor,
    history: Tensor | None,
    guidance_scale: float | Tensor,
    guidance_rescale: float | Tensor,
) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if sample.ndim != 4 or not sample.is_floating_point():
        raise ValueError(
            f"sample has shape {tuple(sample.shape)} and dtype {sample.dtype}; "
            "accepted: a floating-point (batch, channels, height, width) tensor"
        )
    for name, tensor in (("noise_cond", noise_cond), ("noise_uncond", noise_uncond), ("history", history)):
        if tensor is None:
            continue
        if tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: sample's, {tuple(sample.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: a floating-point dtype")
        check_same_device("sample", sample, **{name: tensor})
    if noise_uncond is not None and noise_uncond.dtype != noise_cond.dtype:
        raise ValueError(f"noise_uncond has dtype {noise_uncond.dtype}; accepted: noise_cond's, {noise_cond.dtype}")
    if history is not None and history.dtype != sample.dtype:
        raise ValueError(f"history has dtype {history.dtype}; accepted: sample's, {sample.dtype}")

    rows = sample.shape[0]
    if coefficients.shape != (rows, 5) or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)} and dtype {coefficients.dtype}; "
            f"accepted: {(rows, 5)}, one row [s, e, h, p, q] per sample, in torch.float32"
        )
    check_same_device("sample", sample, coefficients=coefficients)

    for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
        if not isinstance(value, Tensor):
            continue
        if value.shape != (rows,) or not value.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; "
                f"accepted: a number or a floating-point tensor of shape {(rows,)}"
            )
        check_same_device("sample", sample, **{name: value})
    if not isinstance(guidance_scale, Tensor) and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; accepted: a finite number or one per row")
    if not isinstance(guidance_rescale, Tensor) and not 0.0 <= guidance_rescale <= 1.0:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; accepted: 0 to 1, or one such number per row")
