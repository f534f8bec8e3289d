"""Recipes: one TOML file a run, read strictly, so that what was run can be read and run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field

from catimage_accel.candidate import Sampler
from catimage_accel.catalog import BUILT_IN, built_in_folder
from catimage_accel.storage import Strict, read_toml, validated
from catimage_accel.training.config import TrainConfig, computes_in_bf16

RUN_PREFIX = "run:"

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0, le=100)]


class Training(Strict):
    """Fields of TrainConfig; those that are absent have its defaults.

    ``precision`` "auto" is bf16 where the device computes in it, else fp32.
    """

    steps: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup: Annotated[int, Field(ge=0)] = 100
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.35
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: Count = 250
    log_every: Count = 20
    accumulation: Count = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def precision_on(self, device: torch.device) -> str:
        """What the model computes in."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if computes_in_bf16(device) else "fp32"

    def config(self, device: torch.device, validate_every: int, steps: int | None = None) -> TrainConfig:
        values = self.model_dump() | ({} if steps is None else {"steps": steps})
        values["precision"] = self.precision_on(device)
        return TrainConfig(**values, validate_every=validate_every)


class Validation(Strict):
    """Pictures, and CLIPScore where there is a judge, every so many steps.

    ``prompts`` is a text file, a prompt a line, or "emoji": held-out captions of the built-in zoo.
    """

    every: Count = 500
    prompts: Text = BUILT_IN
    number: Count = 32
    steps: Count | None = None
    guidance_scale: Scale = 4.0
    judge: Text | None = None


class UnguidedValidation(Validation):
    """Of a student that is to draw without guidance."""

    guidance_scale: Annotated[float, Field(ge=0, le=1)] = 1.0


class _Recipe(Strict):
    """``model`` is a diffusers folder, relative to the recipe's, or "emoji"; ``data`` a folder of pictures, or "emoji".

    "emoji:200000" is so many scenes of the built-in zoo, instead of those that its teacher was trained on.
    A UNet is a subfolder of ``model``, or "run:NAME" for the result of an earlier run in the same work folder.
    """

    model: Text
    data: Text
    training: Training


class _PromptRecipe(Strict):
    """Learnt from what ``model`` itself draws of the first ``number`` prompts.

    ``prompts`` is a text file, a prompt a line, or "emoji": captions of the built-in zoo's training scenes.
    """

    model: Text
    prompts: Text = BUILT_IN
    number: Count


class _Student(Strict):
    """``start_weight`` is the share of the weights that the student began with in the result, the rest being the
    trained ones' average: what lies between the two often does better than both (WiSE-FT, arXiv 2109.01903).
    It may be changed after the run, which then writes its result anew.
    """

    student: Text = "unet"
    start_weight: Share = 0.0
    validation: Validation | None = None


class FinetuneRecipe(_Student, _Recipe):
    """v-prediction on training pictures; with ``teacher_weight`` in part on what a teacher predicts; with
    ``student_steps`` on the timesteps of so many DDIM steps alone.
    """

    teacher: Text = "unet"
    teacher_weight: Share = 0.0
    student_steps: Annotated[int, Field(ge=1, le=500)] | None = None
    caption_dropout: Share = 0.1


class StepsRecipe(_Student, _Recipe):
    """Step distillation; see ``losses.StepLoss``."""

    teacher: Text = "unet"
    teacher_steps: Annotated[int, Field(ge=2, le=1000)]
    student_steps: Annotated[int, Field(ge=1, le=500)]
    guidance: Annotated[list[Scale], Field(min_length=2, max_length=2, default_factory=lambda: [2.0, 14.0])]
    cfg_probability: Share = 0.1
    denoising_weight: Annotated[float, Field(ge=0)] = 0.2
    caption_dropout: Share = 0.1


class GuidanceRecipe(_Student, _PromptRecipe):
    """Guidance distillation; see ``losses.GuidanceLoss``."""

    teacher: Text = "unet"
    teacher_steps: Annotated[int, Field(ge=1, le=1000)]
    student_steps: Annotated[int, Field(ge=1, le=500)]
    guidance_scale: Scale
    guidance_rescale: Share = 0.0
    training: Training
    validation: UnguidedValidation | None = None


class Search(Strict):
    """How the architecture is searched for.

    ``speedup`` is the target: the whole UNet's latency over the found one's, at ``rows`` rows on ``engine``.
    Each round values all actions on the first ``prompts`` of ``prompt_file`` (a text file, a prompt a line, or "emoji")
    drawn in ``steps`` DDIM steps, and takes those that save ``saving`` of the whole latency; then ``steps_between``
    more steps of robust training follow. Where the target leaves room, up to ``additions`` blocks are added at last.
    """

    speedup: Annotated[float, Field(gt=1, le=100)]
    engine: Text = "eager"
    rows: Count = 8
    prompt_file: Text = BUILT_IN
    prompts: Count = 64
    steps: Count = 8
    guidance_scale: Scale = 4.0
    steps_between: Annotated[int, Field(ge=0)] = 100
    saving: Annotated[float, Field(gt=0, lt=1)] = 0.1
    additions: Annotated[int, Field(ge=0)] = 0
    judge: Text


class ArchitectureRecipe(_Recipe):
    """Robust training of ``student`` and the search for an efficient UNet in it."""

    student: Text = "unet"
    keep: Annotated[list[Share], Field(min_length=2, max_length=2, default_factory=lambda: [0.5, 1.0])]
    caption_dropout: Share = 0.1
    search: Search


class DecoderRecipe(_PromptRecipe):
    """A decoder with ``keep`` of the channels, trained on the latents of those pictures."""

    unet: Text = "unet"
    steps: Count = 10
    sampler: Sampler = "dpmsolver++"
    guidance_scale: Scale = 4.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 500_000
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    training: Training
    validate_every: Count = 250


R = TypeVar("R", FinetuneRecipe, StepsRecipe, GuidanceRecipe, ArchitectureRecipe, DecoderRecipe)


def read_recipe(path: Path, kind: type[R]) -> R:
    """The recipe in ``path``; FileNotFoundError, or ValueError naming the first thing that is wrong with it."""
    return validated(kind, read_toml(path, "a recipe is a TOML file"), str(path))


def find_recipe(given: Path) -> Path:
    """``given``, or the shipped recipe of that name; FileNotFoundError lists those."""
    if given.is_file():
        return given
    named = shipped() / f"{given}.toml"
    if given.parent == Path() and named.is_file():
        return named
    names = ", ".join(sorted(path.stem for path in shipped().glob("*.toml")))
    raise FileNotFoundError(f"{given} is no file; accepted: a TOML file, or the name of a shipped recipe: {names}")


def shipped() -> Path:
    """The folder of the recipes that made the built-in catalog's students."""
    return built_in_folder().parent / "recipes"
