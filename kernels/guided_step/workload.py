"""The denoising steps of SD1.5 and SDXL. Their latents are small: there is nothing to tune."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from catimage_accel.kernels.guided_step import guided_step
from catimage_accel.kernels.tuning.workload import STAGES, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of the latents of 512x512 and 1024x1024 pixels, guidance rescaled or not; of the smallest stage alone."""
    for side in (64, 128) if stages is STAGES else (min(stage.side for stage in stages),):
        for rescale in (0.0, 0.7):
            name = f"{side}x{side} latents{', rescaled' * (rescale > 0)}, batch {batch}"
            yield of_size(name, dtype, (batch, 4, side, side), rescale)


def of_size(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int], rescale: float) -> Workload:
    """One call on random tensors of this shape, sampler's history included."""
    numel = shape[0] * shape[1] * shape[2] * shape[3]
    return Workload(
        "guided_step", name, shape[0], dtype, guided_step, partial(_arguments, shape, rescale),
        flops=10 * numel, bytes=6 * numel * dtype.itemsize, exact_as_is=("coefficients",),
    )  # fmt: skip


def _arguments(
    shape: tuple[int, int, int, int], rescale: float, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    names = ("sample", "noise_cond", "noise_uncond", "history")
    tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name in names}
    coefficients = torch.randn(shape[0], 5, device=device)
    return {**tensors, "coefficients": coefficients, "guidance_scale": 5.0, "guidance_rescale": rescale}
