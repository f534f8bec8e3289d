"""The ways of training a student UNet: on v, on fewer steps than its teacher takes, on doing without guidance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from catimage_accel.snapfusion.losses import (
    DenoisingLoss,
    GuidanceLoss,
    StepLoss,
    check_pictures,
    check_steps,
    denoiser_of,
)
from catimage_accel.snapfusion.recipes import FinetuneRecipe, GuidanceRecipe, StepsRecipe, read_recipe
from catimage_accel.snapfusion.run import RESULT, Run
from catimage_accel.snapfusion.schedule import NOISE, V
from catimage_accel.training.loop import Trainer
from catimage_accel.training.record import run_record

PREVIEW_STEPS = 25


def finetune(path: Path, work: Path, device: torch.device, steps: int | None = None) -> Path:
    """Train recipe ``path``'s student on v, or go on from its checkpoint; returns the finished UNet's folder.

    ``steps`` instead of the recipe's. Errors as in ``Run`` and ``Trainer``, before training but for divergence.
    """
    recipe = read_recipe(path, FinetuneRecipe)
    run = Run(path, work, device, recipe.model, recipe.training.precision_on(device))
    student = run.unet(recipe.student)
    taught = recipe.teacher_weight > 0
    loss = DenoisingLoss(
        run.source(recipe.data), run.text, run.schedule, recipe.training.batch_size, recipe.caption_dropout,
        denoiser_of(run.frozen(recipe.teacher), run.dtype) if taught else None, recipe.teacher_weight,
        recipe.student_steps,
    )  # fmt: skip
    starts = {"student": recipe.student} | ({"teacher": recipe.teacher} if taught else {})
    return _train(run, recipe, student, loss, loss.source.name, starts, recipe.student_steps or PREVIEW_STEPS, steps)


def distill_steps(path: Path, work: Path, device: torch.device, steps: int | None = None) -> Path:
    """Teach recipe ``path``'s student to take fewer steps than its teacher; otherwise as ``finetune``."""
    recipe = read_recipe(path, StepsRecipe)
    check_steps(recipe.teacher_steps, recipe.student_steps)
    run = Run(path, work, device, recipe.model, recipe.training.precision_on(device))
    student = run.unet(recipe.student)
    low, high = recipe.guidance
    loss = StepLoss(
        run.source(recipe.data), run.text, run.schedule, denoiser_of(run.frozen(recipe.teacher), run.dtype),
        recipe.teacher_steps, recipe.student_steps, recipe.training.batch_size, (low, high), recipe.cfg_probability,
        recipe.denoising_weight, recipe.caption_dropout,
    )  # fmt: skip
    starts = {"student": recipe.student, "teacher": recipe.teacher}
    return _train(run, recipe, student, loss, loss.source.name, starts, recipe.student_steps, steps)


def distill_guidance(path: Path, work: Path, device: torch.device, steps: int | None = None) -> Path:
    """Teach recipe ``path``'s student to draw without guidance what its teacher draws with it; else as ``finetune``."""
    recipe = read_recipe(path, GuidanceRecipe)
    check_pictures(recipe.teacher_steps, recipe.student_steps, recipe.training.batch_size)
    run = Run(path, work, device, recipe.model, recipe.training.precision_on(device), (V, NOISE))
    student = run.unet(recipe.student)
    prompts = run.prompts(recipe.prompts, recipe.number, training=True)
    loss = GuidanceLoss(
        prompts, run.text, run.schedule, denoiser_of(run.frozen(recipe.teacher), run.dtype), recipe.teacher_steps,
        recipe.student_steps, recipe.training.batch_size, run.latent_shape, recipe.guidance_scale,
        recipe.guidance_rescale,
    )  # fmt: skip
    source = f"prompts-{len(prompts)}-{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]}"
    starts = {"student": recipe.student, "teacher": recipe.teacher}
    return _train(run, recipe, student, loss, source, starts, recipe.student_steps, steps)


def _train(
    run: Run,
    recipe: FinetuneRecipe | StepsRecipe | GuidanceRecipe,
    student: UNet2DConditionModel,
    loss: DenoisingLoss | StepLoss | GuidanceLoss,
    source: str,
    starts: dict[str, str],
    preview_steps: int,
    steps: int | None,
) -> Path:
    validate = None
    wanted = recipe.validation
    if wanted is not None:
        validate = run.preview(wanted).validator(
            denoiser_of(student, run.dtype), wanted.steps or preview_steps, wanted.guidance_scale,
            run.folder / "validation",
        )  # fmt: skip
    config = recipe.training.config(run.device, 0 if wanted is None else wanted.every, steps)
    told: dict[str, Any] = recipe.model_dump(exclude={"training", "validation", "start_weight"})
    told |= {"source": source} | {f"{role} weights": run.digest(name) for role, name in starts.items()}
    trainer = Trainer(
        student, config, run.folder, run.device, run.path.stem, recipe=told, validate=validate,
        start_weight=recipe.start_weight,
    )  # fmt: skip
    denoiser = denoiser_of(trainer.forward, run.dtype)
    trainer.run(lambda _, generator: loss(denoiser, generator))
    student.float().load_state_dict(trainer.ema_state())
    if trainer.accelerator.is_main_process:
        facts = {"start_weight": recipe.start_weight} | run_record(run.folder, config, run.device)
        run.write(student, told | facts)
    trainer.accelerator.wait_for_everyone()  # another process may begin what this result is the start of
    return run.folder / RESULT
