"""What every training run is made of: the model's parts, the pairs to train on, the folder it is kept in."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from catimage_accel.catalog import BUILT_IN, built_in_folder
from catimage_accel.engines.loading import (
    has_two_text_encoders,
    latent_size,
    load_unet,
    load_vae,
    pixels_per_latent,
    read_config,
)
from catimage_accel.quantize.quantization import weights_sha256
from catimage_accel.snapfusion.captioned import Captioned, PictureFolder
from catimage_accel.snapfusion.conditioning import FrozenText
from catimage_accel.snapfusion.lines import text_lines
from catimage_accel.snapfusion.preview import Preview
from catimage_accel.snapfusion.recipes import RUN_PREFIX, Validation
from catimage_accel.snapfusion.schedule import V, VelocitySchedule
from catimage_accel.storage import write_atomic
from catimage_accel.training.config import PRECISIONS
from catimage_accel.training.process import own_device, stopping_waits
from catimage_accel.training.record import RECORD_FILE

RESULT = "unet"


@dataclass(frozen=True)
class Run:
    """A run of recipe ``path`` on ``device``: its checkpoints and its result are in ``work/<the recipe's name>``.

    One of several processes has the GPU that is its own, whichever ``device`` names.
    """

    path: Path
    work: Path
    device: torch.device
    model_name: str
    precision: str
    predicted: tuple[str, ...] = (V,)
    """What the model's UNets may predict."""

    def __post_init__(self) -> None:
        # Before anything is loaded: accelerate gives the trained model the same one.
        object.__setattr__(self, "device", own_device(self.device))

    @property
    def folder(self) -> Path:
        return self.work / self.path.stem

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @cached_property
    def model(self) -> Path:
        """The diffusers folder; FileNotFoundError if it is none, ValueError if it is of SDXL's layout."""
        folder = built_in_folder() / "model" if self.model_name == BUILT_IN else self.path.parent / self.model_name
        if not (folder / "scheduler" / "scheduler_config.json").is_file():
            raise FileNotFoundError(
                f"{self.path}: model is {self.model_name!r}, but {folder} is no diffusers folder; accepted: one with "
                f"unet, vae, text_encoder, tokenizer and scheduler, or {BUILT_IN!r}"
            )
        if has_two_text_encoders(folder):
            raise ValueError(
                f"{self.path}: model is {self.model_name!r}, which has two text encoders; accepted: models of Stable "
                "Diffusion 1.x's and 2.x's layout"
            )
        return folder

    @cached_property
    def schedule(self) -> VelocitySchedule:
        return VelocitySchedule.of_model(self.model, self.device, self.predicted)

    @cached_property
    def text(self) -> FrozenText:
        return FrozenText(self.model, self.device, self.dtype)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_vae(self.model, torch.float32).to(self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one image: (C, h, w)."""
        height, width = latent_size(read_config(self.model / "unet" / "config.json"))
        return self.vae.config.latent_channels, height, width

    def source(self, data: str) -> Captioned:
        """The training pairs; latents are kept in ``work``."""
        name, _, number = data.partition(":")
        if name == BUILT_IN:
            from catimage_accel.zoo.training.captioned import SCENES, CaptionedScenes
            from catimage_accel.zoo.training.denoiser import teacher_weight

            if number and not (number.isdecimal() and int(number)):
                raise ValueError(f"{self.path}: data is {data!r}; accepted: {BUILT_IN!r}, or {BUILT_IN}:200000 scenes")
            return CaptionedScenes(self.work, self.vae, teacher_weight, int(number or SCENES))
        scale = pixels_per_latent(self.vae.config)
        _, height, width = self.latent_shape
        size = (height * scale, width * scale)
        return PictureFolder(self.path.parent / data, self.model, size, self.work, self.device)

    def unet_folder(self, name: str) -> tuple[Path, str]:
        """(parent, subfolder) of a UNet named by a recipe."""
        if name.startswith(RUN_PREFIX):
            parent, part = self.work / name.removeprefix(RUN_PREFIX), RESULT
        else:
            parent, part = self.model, name
        if not (parent / part / "config.json").is_file():
            raise FileNotFoundError(
                f"{self.path}: {name!r} is no UNet: {parent / part} is missing; accepted: a subfolder of the model, or "
                f"{RUN_PREFIX}NAME of a run that was finished in {self.work}"
            )
        return parent, part

    def unet(self, name: str) -> UNet2DConditionModel:
        """The UNet named by a recipe, float32, with the attention that is fast to train on this device.

        ValueError if it is none for this model, or needs more than a prompt.
        """
        _ = self.schedule  # a model that predicts something else is told before anything is loaded
        unet = load_unet(*self.unet_folder(name), torch.float32).requires_grad_(True).train()
        channels = self.vae.config.latent_channels
        if unet.config.in_channels != channels or unet.config.out_channels != channels:
            raise ValueError(
                f"{name!r} has {unet.config.in_channels} channels in and {unet.config.out_channels} out; accepted: "
                f"{channels}, those of the latents of {self.model / 'vae'}"
            )
        width, features = unet.config.cross_attention_dim, self.text.encoder.config.hidden_size
        if width != features:
            raise ValueError(f"{name!r} takes text of {width} features; {self.model / 'text_encoder'} gives {features}")
        if unet.config.addition_embed_type is not None:
            needs = unet.config.addition_embed_type
            raise ValueError(f"{name!r} needs more than a prompt ({needs}); accepted: UNets as SD1.x's and SD2.x's")
        if self.device.type == "cpu":
            unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on a CPU
        return unet

    def frozen(self, name: str) -> UNet2DConditionModel:
        """The UNet as a teacher, in the run's precision."""
        unet = self.unet(name).eval().requires_grad_(False)
        nn.Module.to(unet, self.device, self.dtype)  # diffusers' own warns of every change of type
        return unet

    def digest(self, name: str) -> str:
        """Tells the weights of a UNet named by a recipe."""
        return weights_sha256(*self.unet_folder(name))[:16]

    def preview(self, wanted: Validation) -> Preview:
        """The validation prompts, ready to be drawn."""
        return Preview(
            self.prompts(wanted.prompts, wanted.number), self.text, self.schedule, self.vae, self.latent_shape,
            None if wanted.judge is None else self.judge(wanted.judge),
        )  # fmt: skip

    def prompts(self, name: str, number: int, *, training: bool = False) -> list[str]:
        """The first prompts of a text file, or captions of the built-in zoo: its training scenes' or held-out ones."""
        if name == BUILT_IN:
            from catimage_accel.zoo.training.data import VALIDATION_CAPTIONS, held_out_captions, training_captions

            if training:
                return training_captions(number)
            return [text for _, text in held_out_captions(number, VALIDATION_CAPTIONS)]
        path = self.path.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path}: prompts is {name!r}, but {path} is missing; accepted: a text file")
        lines = [line for _, line in text_lines(path)]
        if not lines:
            raise ValueError(f"{path} is empty; accepted: a prompt a line")
        if len(lines) < number:
            warnings.warn(f"{path} has {len(lines)} prompts, fewer than the {number} asked for", stacklevel=2)
        return lines[:number]

    def judge(self, name: str) -> Path:
        return built_in_folder() / "judge" if name == BUILT_IN else self.path.parent / name

    def write(self, model: UNet2DConditionModel | AutoencoderKL, facts: dict[str, Any], name: str = RESULT) -> Path:
        """Keeps the finished model as ``folder/name`` (float16) with ``run.json``, the old one replaced as a whole."""
        partial, final = self.folder / f".{name}.{os.getpid()}", self.folder / name
        model.half().save_pretrained(partial)
        model.float()
        described = partial / "config.json"
        config = read_config(described)
        config.pop("_name_or_path", None)  # diffusers keeps where the run loaded its start from: a path of this machine
        write_atomic(described, (json.dumps(config, indent=2) + "\n").encode())
        write_atomic(self.folder / RECORD_FILE, (json.dumps(facts, indent=2) + "\n").encode())
        replaced = self.folder / f".{name}.{os.getpid()}.old"
        with stopping_waits():
            if final.exists():
                os.replace(final, replaced)
            os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
        return final
