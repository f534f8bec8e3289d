"""The zoo's pieces in the order in which they are trained, and the folder that they are packed into.

Every piece is written to ``work/pieces/<name>`` in diffusers' or transformers' folder format, float16, and
read from there by the pieces that need it. ``work/<name>`` holds its checkpoint and ``loss.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from catimage_accel.training.config import TrainConfig
from catimage_accel.training.record import write_record
from catimage_accel.zoo.training import autoencoder, denoiser, judge
from catimage_accel.zoo.training.tokenizer import build_tokenizer

DEFAULTS: dict[str, TrainConfig] = {
    "autoencoder": autoencoder.DEFAULTS,
    "teacher": denoiser.TEACHER,
    "small": denoiser.SMALL,
    "judge": judge.DEFAULTS,
}
PARTS = ("tokenizer", *DEFAULTS)


def train_part(part: str, work: Path, device: torch.device, steps: int | None = None) -> None:
    """Train one of ``PARTS`` in ``work``, or go on where its checkpoint stands, and write its piece.

    Raises ValueError for an unknown part and FileNotFoundError when a piece that it needs is not there yet.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; accepted: {', '.join(PARTS)}")
    pieces = work / "pieces"
    if part == "tokenizer":
        build_tokenizer().save_pretrained(pieces / "tokenizer")
        return
    config = DEFAULTS[part] if steps is None else dataclasses.replace(DEFAULTS[part], steps=steps)
    _train[part](work, pieces, config, device)
    write_record(work / part, config, device)


def load_piece(pieces: Path, name: str) -> nn.Module | CLIPTokenizer:
    """A finished piece, weights in float32."""
    folder = pieces / name
    if not folder.is_dir():
        makers = {"vae": "autoencoder", "unet": "teacher", "text_encoder": "teacher", "unet_small": "small"}
        raise FileNotFoundError(f"{folder} is missing; make it with `catimage zoo train {makers.get(name, name)}`")
    kinds = {
        "tokenizer": CLIPTokenizer, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel, "unet_small": UNet2DConditionModel, "judge": CLIPModel,
    }  # fmt: skip
    return kinds[name].from_pretrained(folder)


def save_piece(model: nn.Module, folder: Path) -> None:
    """Write ``model`` with float16 weights under a config that says float32, the type to load and compute in."""
    model = model.half()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "dtype" in config:
        config["dtype"] = "float32"
        for nested in ("text_config", "vision_config"):
            if nested in config:
                config[nested]["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float()


def _train_autoencoder(work: Path, pieces: Path, config: TrainConfig, device: torch.device) -> None:
    save_piece(autoencoder.train_autoencoder(work / "autoencoder", config, device), pieces / "vae")


def _train_teacher(work: Path, pieces: Path, config: TrainConfig, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    tokenizer, vae = load_piece(pieces, "tokenizer"), load_piece(pieces, "vae").to(device)
    text_encoder = denoiser.new_text_encoder(tokenizer)
    unet = denoiser.new_teacher(vae.config.latent_channels)
    denoiser.train_denoiser(
        work / "teacher", config, device, vae, tokenizer, text_encoder, unet, denoiser.teacher_weight
    )
    save_piece(text_encoder, pieces / "text_encoder")
    save_piece(unet, pieces / "unet")


def _train_small(work: Path, pieces: Path, config: TrainConfig, device: torch.device) -> None:
    torch.manual_seed(config.seed + 1)
    tokenizer, vae = load_piece(pieces, "tokenizer"), load_piece(pieces, "vae").to(device)
    unet = denoiser.new_small(vae.config.latent_channels)
    text_encoder = load_piece(pieces, "text_encoder")
    denoiser.train_denoiser(
        work / "small", config, device, vae, tokenizer, text_encoder, unet, denoiser.small_weight, train_text=False
    )
    save_piece(unet, pieces / "unet_small")


def _train_judge(work: Path, pieces: Path, config: TrainConfig, device: torch.device) -> None:
    tokenizer = load_piece(pieces, "tokenizer")
    save_piece(judge.train_judge(work / "judge", config, device, tokenizer), pieces / "judge")
    tokenizer.save_pretrained(pieces / "judge")
    write_image_processor(pieces / "judge")


_train: dict[str, Callable[[Path, Path, TrainConfig, torch.device], None]] = {
    "autoencoder": _train_autoencoder,
    "teacher": _train_teacher,
    "small": _train_small,
    "judge": _train_judge,
}


def write_image_processor(folder: Path) -> None:
    """The judge's preprocessing, as transformers' CLIPImageProcessor reads it: 64x64 pixels scaled to [-1, 1]."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"height": 64, "width": 64}, "resample": 3,
        "do_center_crop": False, "do_convert_rgb": True,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def pack(work: Path, out: Path) -> None:
    """Assemble ``out/model``, a Stable Diffusion folder with a second UNet beside the first, and ``out/judge``."""
    pieces = work / "pieces"
    pipeline = StableDiffusionPipeline(
        vae=load_piece(pieces, "vae"),
        text_encoder=load_piece(pieces, "text_encoder"),
        tokenizer=load_piece(pieces, "tokenizer"),
        unet=load_piece(pieces, "unet"),
        scheduler=denoiser.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(model)
    pipeline.scheduler.save_pretrained(model / "scheduler")
    for name in ("tokenizer", "text_encoder", "vae", "unet", "unet_small"):
        shutil.copytree(pieces / name, model / name, dirs_exist_ok=True)
    shutil.copytree(pieces / "judge", out / "judge", dirs_exist_ok=True)
    runs = {
        part: json.loads((work / part / "run.json").read_text())
        for part in DEFAULTS
        if (work / part / "run.json").exists()
    }
    (out / "training.json").write_text(json.dumps(runs, indent=2) + "\n")
