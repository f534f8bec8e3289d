"""What students are trained on: denoising and step distillation (SnapFusion, arXiv 2306.00980, section 4), guidance
distillation (arXiv 2210.03142)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from catimage_accel.kernels.guided_step.reference import rescaled
from catimage_accel.snapfusion.captioned import Captioned
from catimage_accel.snapfusion.conditioning import FrozenText, with_dropout
from catimage_accel.snapfusion.schedule import VelocitySchedule, clean_from, ddim_step

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sample (n, C, h, w), timestep (n,), text (n, tokens, features)) -> v (n, C, h, w), float32; where told, noise."""


def denoiser_of(unet: torch.nn.Module, dtype: torch.dtype) -> Denoiser:
    """``unet``, whose weights are in ``dtype``, as a function of float32 samples."""

    def predict(sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return unet(sample.to(dtype), timestep, text, return_dict=False)[0].float()

    return predict


@dataclass(eq=False)
class DenoisingLoss:
    """The mean squared error of v on noised training latents, and optionally of what a teacher says of them.

    Timesteps are stratified over a batch; with ``student_steps`` only those are taken that DDIM visits in so many
    steps, for a student that is never asked about others. With ``teacher_weight`` w the target is
    ``(1 - w) * v + w * the teacher's v``: the mean squared error to it has the gradient of the two errors mixed so.
    """

    source: Captioned
    text: FrozenText
    schedule: VelocitySchedule
    batch_size: int
    caption_dropout: float = 0.1
    teacher: Denoiser | None = None
    teacher_weight: float = 0.0
    student_steps: int | None = None

    def __post_init__(self) -> None:
        every = torch.arange(self.schedule.timesteps)
        self._timesteps = every if self.student_steps is None else self.schedule.grid(self.student_steps)[:-1].cpu()

    def __call__(self, student: Denoiser, generator: torch.Generator) -> Tensor:
        device = self.schedule.alpha.device
        clean, captions = self.source.batch(self.batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean = clean.to(device)
        place = stratified_timesteps(self.batch_size, len(self._timesteps), generator)
        timestep = self._timesteps[place].to(device)
        alpha, sigma = self.schedule.rates(timestep)
        text = self.text.encode(with_dropout(captions, self.caption_dropout, generator))
        noisy, target = alpha * clean + sigma * noise, alpha * noise - sigma * clean
        if self.teacher is not None and self.teacher_weight > 0:
            with torch.no_grad():
                target = target.lerp(self.teacher(noisy, timestep, text), self.teacher_weight)
        return F.mse_loss(student(noisy, timestep, text), target)


@dataclass(eq=False)
class StepLoss:
    """Step distillation: one DDIM step of the student is to do what several of the teacher do.

    From a latent ``z`` noised to a timestep ``t`` of the student's grid the teacher goes to where DDIM's step leads,
    ``t''``, in ``teacher_steps / student_steps`` steps of equal length. The student's clean latents must be
    ``(z'' - r z) / (alpha'' - r alpha)`` with ``r = sigma'' / sigma``, weighted by ``max(alpha^2 / sigma^2, 1)``. With
    ``cfg_probability`` a batch compares guided predictions of both instead, each row at a guidance scale w drawn from
    ``guidance``, its error divided by w: guidance multiplies errors as it does differences, and such batches would
    drown the others. The plain denoising loss of the same predictions is added, scaled to ``denoising_weight`` times
    the distillation loss.
    """

    source: Captioned
    text: FrozenText
    schedule: VelocitySchedule
    teacher: Denoiser
    teacher_steps: int
    student_steps: int
    batch_size: int
    guidance: tuple[float, float] = (2.0, 14.0)
    cfg_probability: float = 0.1
    denoising_weight: float = 0.2
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_steps(self.teacher_steps, self.student_steps)
        self.schedule.check_targets(self.student_steps)
        self._now, self._after = self.schedule.grid(self.student_steps)[:-1], self.schedule.after(self.student_steps)

    def __call__(self, student: Denoiser, generator: torch.Generator) -> Tensor:
        device = self.schedule.alpha.device
        guided = float(torch.rand((), generator=generator)) < self.cfg_probability
        clean, captions = self.source.batch(self.batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean = clean.to(device)
        place = torch.randint(self.student_steps, (self.batch_size,), generator=generator).to(device)
        now, after = self._now[place], self._after[place]
        low, high = self.guidance
        scale = low + (high - low) * torch.rand(self.batch_size, 1, 1, 1, generator=generator).to(device)
        captions = captions if guided else with_dropout(captions, self.caption_dropout, generator)
        text = self.text.encode(captions)
        empty = self.text.empty(self.batch_size)

        def predict(model: Denoiser, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            if guided:
                return guided_velocity(model, sample, timestep, text, empty, scale)
            velocity = model(sample, timestep, text)
            return velocity, velocity

        alpha, sigma = self.schedule.rates(now)
        noisy = alpha * clean + sigma * noise
        with torch.no_grad():
            target = self.target(lambda sample, t: predict(self.teacher, sample, t)[0], noisy, now, after)
        velocity, conditional = predict(student, noisy, now)
        weight = (alpha / sigma).square().clamp(min=1) / (scale.square() if guided else 1)
        loss = (weight * (target - clean_from(noisy, velocity, alpha, sigma)).square()).mean()
        if self.denoising_weight == 0:
            return loss
        plain = F.mse_loss(conditional, alpha * noise - sigma * clean)
        return loss + self.denoising_weight * (loss / plain).detach() * plain

    def target(self, teacher: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, now: Tensor, after: Tensor) -> Tensor:
        """The clean latents that take the student in one step from ``noisy`` to where the teacher arrives."""
        parts = self.teacher_steps // self.student_steps
        arrived = taught_step(self.schedule, teacher, noisy, now, after, parts)
        return clean_towards(self.schedule, noisy, arrived, now, after)


@dataclass(eq=False)
class GuidanceLoss:
    """Guidance distillation (arXiv 2210.03142): one row of the student is to do what two of the guided teacher do.

    No training pictures are needed: for each of ``batch_size / student_steps`` prompts the teacher draws one from fresh
    noise, in ``teacher_steps`` DDIM steps, guided by ``guidance_scale`` and rescaled as ``guided_step`` does, and the
    student is asked, at each of its ``student_steps`` timesteps on the teacher's way, for the v whose one step arrives
    where the teacher does. The loss is the mean squared error of v, also of UNets that predict noise: that of the noise
    would all but forget the first steps, where an error of it moves the picture most. ``guidance_scale`` up to 1 is a
    teacher without guidance. ``shape`` is that of one image's latents, (C, h, w).
    """

    prompts: Sequence[str]
    text: FrozenText
    schedule: VelocitySchedule
    teacher: Denoiser
    teacher_steps: int
    student_steps: int
    batch_size: int
    shape: tuple[int, int, int]
    guidance_scale: float
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        check_pictures(self.teacher_steps, self.student_steps, self.batch_size)
        self.schedule.check_targets(self.student_steps)
        self._now, self._after = self.schedule.grid(self.student_steps)[:-1], self.schedule.after(self.student_steps)

    def __call__(self, student: Denoiser, generator: torch.Generator) -> Tensor:
        pictures = self.batch_size // self.student_steps
        chosen = torch.randint(len(self.prompts), (pictures,), generator=generator)
        text = self.text.encode([self.prompts[index] for index in chosen.tolist()])
        noise = torch.randn(pictures, *self.shape, generator=generator)
        noisy, timestep, target = self.way(noise.to(self._now.device), text)
        said = student(noisy, timestep, text.repeat(self.student_steps, 1, 1))
        return F.mse_loss(self.schedule.velocity(noisy, said, timestep), target)

    @torch.no_grad()
    def way(self, noise: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latents and timesteps at which the student is asked, step after step, and the v that it is to answer."""
        empty, parts = self.text.empty(len(noise)), self.teacher_steps // self.student_steps

        def guided(sample: Tensor, timestep: Tensor) -> Tensor:
            scale, rescale = self.guidance_scale, self.guidance_rescale
            said = guided_prediction(self.teacher, sample, timestep, text, empty, scale, rescale)
            return self.schedule.velocity(sample, said, timestep)

        sample, found = noise, []
        for start, end in zip(self._now, self._after, strict=True):
            now, after = start.expand(len(noise)), end.expand(len(noise))
            arrived = taught_step(self.schedule, guided, sample, now, after, parts)
            alpha, sigma = self.schedule.rates(now)
            clean = clean_towards(self.schedule, sample, arrived, now, after)
            found.append((sample, now, (alpha * sample - clean) / sigma))
            sample = arrived
        noisy, timestep, target = (torch.cat(parts) for parts in zip(*found, strict=True))
        return noisy, timestep, target


def taught_step(
    schedule: VelocitySchedule, teacher: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, now: Tensor, after: Tensor,
    parts: int,
) -> Tensor:  # fmt: skip
    """Where the teacher arrives at ``after``, from ``noisy`` at ``now`` (n,), in ``parts`` equally long DDIM steps."""
    sample, timestep, here = noisy, now, schedule.rates(now)
    for part in range(1, parts + 1):
        between = (now + torch.round((after - now) * (part / parts)).long()).clamp(min=0)
        following = between if part < parts else after
        there = schedule.rates(following)
        sample, timestep, here = ddim_step(sample, teacher(sample, timestep), here, there), following, there
    return sample


def clean_towards(schedule: VelocitySchedule, noisy: Tensor, arrived: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """The clean latents whose one DDIM step takes ``noisy`` at ``now`` to ``arrived`` at ``after``."""
    rates, there = schedule.rates(now), schedule.rates(after)
    ratio = there[1] / rates[1]
    return (arrived - ratio * noisy) / (there[0] - ratio * rates[0])


def check_steps(teacher_steps: int, student_steps: int) -> None:
    """ValueError unless a teacher's ``teacher_steps`` are a multiple of a student's ``student_steps``."""
    if teacher_steps % student_steps or teacher_steps == student_steps:
        raise ValueError(
            f"teacher_steps is {teacher_steps}; accepted: a multiple of student_steps ({student_steps}), "
            f"{2 * student_steps} as a rule"
        )


def check_pictures(teacher_steps: int, student_steps: int, batch_size: int) -> None:
    """ValueError unless a batch of ``batch_size`` holds whole pictures, and the teacher's steps the student's."""
    if teacher_steps % student_steps:
        raise ValueError(f"teacher_steps is {teacher_steps}; accepted: student_steps ({student_steps}) or a multiple")
    if batch_size % student_steps:
        raise ValueError(
            f"batch_size is {batch_size}; accepted: a multiple of student_steps ({student_steps}), for a batch holds "
            "whole pictures, a row a step"
        )


def stratified_timesteps(batch_size: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of ``batch_size`` equal strata, int64: the expectation of any, with less variance."""
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    return (strata / batch_size * timesteps).long().clamp(max=timesteps - 1)


def guided_velocity(
    model: Denoiser, sample: Tensor, timestep: Tensor, text: Tensor, empty: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance (arXiv 2207.12598): the guided prediction, and the conditional one.

    ``empty`` is the text state that it leads away from, a row each; ``scale`` one number or one a row, (n, 1, 1, 1).
    """
    both = model(sample.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([empty, text]))
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional), conditional


def guided_prediction(
    model: Denoiser, sample: Tensor, timestep: Tensor, text: Tensor, empty: Tensor, scale: float, rescale: float = 0.0
) -> Tensor:
    """What a sampler goes on with: guided, and rescaled as ``guided_step`` does; unguided for a scale up to 1."""
    if scale <= 1:
        return model(sample, timestep, text)
    velocity, conditional = guided_velocity(model, sample, timestep, text, empty, scale)
    return rescaled(velocity, conditional, rescale) if rescale > 0 else velocity
