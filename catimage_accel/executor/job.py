"""What goes into the executor and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from catimage_accel.arguments import is_whole

if TYPE_CHECKING:
    from catimage_accel.candidate import Candidate
    from catimage_accel.engines import Engine
    from catimage_accel.executor.samplers import SamplerTable

__all__ = ["Finished", "Job", "Step", "first_sample", "step_noise"]


@dataclass(frozen=True, eq=False)
class Job:
    """One image to draw.

    Attributes:
        prompt: The text; the negative prompt is the empty one.
        candidate: How to draw it.
        generator: Draws the initial noise as diffusers does for one image, and that of all steps for a sampler that
            adds some, when the executor takes the job on; jobs take from a generator they share in the order in which
            the executor pulls them. None: torch's global one.
        latents: Unit Gaussian noise to start from instead, (C, h, w) or (1, C, h, w), as diffusers' ``latents``.
        height, width: Pixels, multiples of the decoder's scale factor; None: what the UNet was trained on (or the size
            of ``latents``).
        key: Anything; comes back with the image.
    """

    prompt: str
    candidate: Candidate
    generator: torch.Generator | None = None
    latents: Tensor | None = None
    key: Any = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """A job's outcome: an image, or the error that kept this one job from having one.

    Attributes:
        key, job: The job and its key.
        image: uint8 (height, width, 3), None if the job failed.
        latents: The final latents, float32 (C, h, w), before decoding; also there when only decoding failed.
        milliseconds: Wall time from when the job was taken on to when its image was there, so with others in the
            batch, and waiting for a slot, counted.
        error: What went wrong with this job; None if nothing did.
    """

    key: Any
    job: Job
    image: np.ndarray | None
    milliseconds: float
    latents: Tensor | None
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One image after one of its steps, as ``on_step`` sees it.

    ``index`` counts from 0 to ``steps - 1``; ``timestep`` is what the UNet was given; ``latents``, float32 (C, h, w),
    are diffusers' latents after the step, a copy. ``on_step`` may return other latents of that shape to go on from.
    ``denoised``, of the same shape, are the final latents as the step predicts them, for a preview; ``batch`` is the
    number of images that the step was taken with, this one included.
    """

    job: Job
    index: int
    steps: int
    timestep: float
    latents: Tensor
    denoised: Tensor
    batch: int


def first_sample(job: Job, engine: Engine, table: SamplerTable) -> Tensor:
    """The job's first sample, float32 (C, h, w) on the engine's device; draws from the job's generator.

    The noise is drawn in the engine's dtype, as diffusers does, and kept in float32 from there on. Raises ValueError
    for a prompt that is no text and for sizes that do not fit the model.
    """
    if not isinstance(job.prompt, str):
        raise ValueError(f"prompt is {job.prompt!r}; accepted: a string")
    shape = (engine.channels, *_latent_size(job, engine))
    if job.latents is not None:
        noise = job.latents[0] if job.latents.ndim == 4 and len(job.latents) == 1 else job.latents
        if tuple(noise.shape) != shape or not noise.is_floating_point():
            raise ValueError(
                f"latents have shape {tuple(job.latents.shape)} and dtype {job.latents.dtype}; accepted: "
                f"floating-point {shape}"
            )
        noise = noise.to(engine.device)
    else:
        noise = _drawn(job, engine, shape)
    return noise.to(device=engine.device, dtype=torch.float32) * table.initial_scale


def step_noise(job: Job, engine: Engine, table: SamplerTable, shape: torch.Size) -> Tensor | None:
    """The noise of every step for a sampler that adds some, float32 (table.noises, C, h, w); None for the others.

    To be drawn after :func:`first_sample`, of whose sample ``shape`` is.
    """
    if not table.noises:
        return None
    noise = [_drawn(job, engine, shape) for _ in range(table.noises)]
    return torch.stack(noise).to(device=engine.device, dtype=torch.float32)


def _drawn(job: Job, engine: Engine, shape: tuple[int, ...]) -> Tensor:
    """(C, h, w) unit noise, drawn as diffusers does for one image."""
    drawn_on = engine.device if job.generator is None else job.generator.device
    return torch.randn((1, *shape), generator=job.generator, device=drawn_on, dtype=engine.dtype)[0]


def _latent_size(job: Job, engine: Engine) -> tuple[int, int]:
    default = engine.sample_size if job.latents is None else tuple(job.latents.shape[-2:])
    sides = []
    for name, pixels, latents in (("height", job.height, default[0]), ("width", job.width, default[1])):
        factor = engine.scale_factor
        if pixels is not None and (not is_whole(pixels) or pixels <= 0 or pixels % factor):
            raise ValueError(f"{name} is {pixels!r}; accepted: a positive multiple of {factor}")
        sides.append(latents if pixels is None else int(pixels) // factor)
    return sides[0], sides[1]


def check_guidance(guidance_scale: float) -> None:
    """Raises ValueError for a guidance scale that is not finite or is negative."""
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ValueError(f"guidance_scale is {guidance_scale}; accepted: a finite number from 0")
