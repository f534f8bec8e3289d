"""Reads diffusers folders: checked before any weight is loaded, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from catimage_accel.candidate import OWN_VAE, QUANTIZED_PRECISIONS
from catimage_accel.lora import AdaptedUNet, UNetPart, check_lora, fuse

__all__ = [
    "PRECISIONS", "check_model_folder", "check_precision", "has_two_text_encoders", "latent_size", "load_component",
    "load_unet", "load_vae", "model_class", "pixels_per_latent", "read_config",
]  # fmt: skip

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TEXT_CLASSES = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
_VAE_CLASSES = ("AutoencoderKL", "EfficientDecoderKL")
_UNET_CLASSES = ("UNet2DConditionModel", "EfficientUNet")
# Class of a UNet or VAE -> the module that has it, imported when it is needed.
_MODULES = {
    "UNet2DConditionModel": "diffusers", "AutoencoderKL": "diffusers",
    "EfficientUNet": "catimage_accel.efficient_unet", "EfficientDecoderKL": "catimage_accel.efficient_decoder",
}  # fmt: skip


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision, for "int8" and "fp8" that of all that isn't quantized: float16 on CUDA, else float32.

    ValueError for anything else, and for fp16 on the CPU.
    """
    if precision in QUANTIZED_PRECISIONS:
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted: {', '.join((*PRECISIONS, *QUANTIZED_PRECISIONS))}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision is 'fp16' on device 'cpu'; accepted there: fp32, bf16, int8, fp8")
    return PRECISIONS[precision]


def check_model_folder(model: Path, unet: UNetPart = "unet", vae: str = OWN_VAE) -> None:
    """Raises FileNotFoundError or ValueError, one line, for a folder that no engine here can run.

    Looks at names and configs only: the parts are there, of the classes of Stable Diffusion 1.x and 2.x or of SDXL,
    their weights as safetensors; the UNet takes what the text encoders give. Another ``vae`` than the folder's own
    takes latents of the same channels and makes pictures of the same size. Errors of a LoRA are ``check_lora``'s.
    """
    if isinstance(unet, AdaptedUNet):
        check_lora(unet.lora)
    if not model.is_dir():
        raise FileNotFoundError(f"{model} is not a folder; accepted: a diffusers model folder")
    encoders = list(_TEXT_CLASSES)[: 1 + has_two_text_encoders(model)]
    for encoder in encoders:
        _check_tokenizer(model / encoder.replace("text_encoder", "tokenizer"))
    parts = {encoder: _TEXT_CLASSES[encoder] for encoder in encoders} | {vae: _VAE_CLASSES, unet: _UNET_CLASSES}
    for part, classes in parts.items():
        config = read_config(model / part / "config.json")
        found = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if found not in classes:
            raise ValueError(f"{model / part / 'config.json'}: the class is {found!r}; accepted: {', '.join(classes)}")
        if part == vae and (config.get("latents_mean") or config.get("latents_std")):
            raise ValueError(
                f"{model / part / 'config.json'}: latents_mean and latents_std are set; accepted: VAEs whose latents "
                "are scaled by scaling_factor alone"
            )
        _weight_variant(model / part, part)
    _check_unet(model, unet)
    _check_added_conditions(model, unet)
    if vae != OWN_VAE:
        found, own = (_latents_of(model / name / "config.json") for name in (vae, OWN_VAE))
        if found != own:
            raise ValueError(
                f"{model / vae / 'config.json'}: (latent_channels, pixels a latent) are {found}; accepted: {own}, "
                f"as in {model / OWN_VAE}"
            )


def _check_unet(model: Path, unet: UNetPart) -> None:
    """A UNet that takes the model's latents and a prompt, nothing else, and predicts what is of the latents' shape."""
    path = model / unet / "config.json"
    config, latents = read_config(path), read_config(model / OWN_VAE / "config.json")
    if config.get("sample_size") is None:
        raise ValueError(
            f"{path}: sample_size is missing; accepted: the side of the latents that it was trained on, such as 64"
        )
    for name, needs in {
        "time_cond_proj_dim": "a guidance embedding", "class_embed_type": "class labels",
        "num_class_embeds": "class labels",
    }.items():  # fmt: skip
        if config.get(name) is not None:
            raise ValueError(f"{path}: {name} is {config[name]!r}; accepted: UNets without {needs}")
    channels = latents.get("latent_channels", 4)
    found = config.get("in_channels", 4), config.get("out_channels", 4)
    if found != (channels, channels):
        raise ValueError(
            f"{path}: (in_channels, out_channels) are {found}; accepted: {(channels, channels)}, as the latents of "
            f"{model / OWN_VAE} have (an inpainting UNet can't draw a prompt alone)"
        )


def has_two_text_encoders(model: Path) -> bool:
    """Whether a folder is of SDXL's layout: two text encoders, of which the UNet takes the whole prompt as well."""
    return (model / "text_encoder_2").exists()


def _check_added_conditions(model: Path, unet: UNetPart) -> None:
    """SDXL's UNet with two text encoders, others with one; a refiner, which starts from a picture, is neither."""
    path = model / unet / "config.json"
    config = read_config(path)
    kind = config.get("addition_embed_type")
    expected = "text_time" if has_two_text_encoders(model) else None
    if kind != expected:
        raise ValueError(
            f"{path}: addition_embed_type is {kind!r}; accepted: "
            f"{expected!r}, for a folder with {'two text encoders' if expected else 'one text encoder'}"
        )
    if expected is not None:
        pooled = read_config(model / "text_encoder_2" / "config.json").get("projection_dim")
        sizes = 6 * (config.get("addition_time_embed_dim") or 0)
        width = (config.get("projection_class_embeddings_input_dim") or 0) - sizes
        if width != pooled:
            raise ValueError(
                f"{path}: the UNet takes {width} features beside six sizes, text_encoder_2 gives {pooled}; accepted: "
                "as many, as in SDXL's base model (a refiner can't draw a prompt)"
            )


def _check_tokenizer(folder: Path) -> None:
    """transformers makes a tokenizer without words of a folder without a vocabulary, and says nothing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; a diffusers model folder has one")
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise FileNotFoundError(
            f"{folder} has no vocabulary; accepted: tokenizer.json, or vocab.json and merges.txt, which are to be had "
            "where the model is from"
        )


def load_component(kind: Any, model: Path, part: UNetPart, dtype: torch.dtype) -> Any:
    """``kind.from_pretrained`` of one part of a folder: safetensors only, never the network; in eval mode."""
    variant = _weight_variant(model / part, part)
    name = "dtype" if part in _TEXT_CLASSES else "torch_dtype"
    component = kind.from_pretrained(
        str(model / part), use_safetensors=True, local_files_only=True, variant=variant, **{name: dtype}
    )
    return component.eval().requires_grad_(False)


def load_unet(model: Path, unet: UNetPart, dtype: torch.dtype) -> Any:
    """The UNet in a subfolder of ``model``: diffusers' own, or an EfficientUNet; a LoRA is added to its weights."""
    loaded = load_component(model_class(model, unet), model, unet, dtype)
    if isinstance(unet, AdaptedUNet):
        fuse(loaded, unet, xl=has_two_text_encoders(model))
    return loaded


def load_vae(model: Path, dtype: torch.dtype, name: str = OWN_VAE) -> Any:
    """The VAE in a subfolder of ``model``: diffusers' AutoencoderKL, or one with a narrower decoder."""
    return load_component(model_class(model, name), model, name, dtype)


def model_class(model: Path, part: UNetPart) -> Any:
    """The class that the UNet or VAE in ``model/part`` is of; ValueError for one that is not known."""
    path = model / part / "config.json"
    found = read_config(path).get("_class_name")
    if found not in _MODULES:
        raise ValueError(f"{path}: the class is {found!r}; accepted: {', '.join(_MODULES)}")
    return getattr(import_module(_MODULES[found]), found)


def read_config(path: Path) -> dict[str, Any]:
    """The object in one of a model folder's JSON files; FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; accepted: a diffusers model folder with that part")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; accepted: an object")
    return config


def latent_size(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a UNet was trained on, of its config's one or two numbers."""
    size = unet_config["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def pixels_per_latent(vae_config: Mapping[str, Any]) -> int:
    """Pixels a latent along each side, of a VAE's config; diffusers' own number of blocks where it doesn't say."""
    return int(2 ** (len(vae_config.get("block_out_channels", (64,))) - 1))


def _latents_of(path: Path) -> tuple[int, int]:
    """(channels, pixels a latent along each side) of a VAE's config; diffusers' own where it doesn't say."""
    config = read_config(path)
    return config.get("latent_channels", 4), pixels_per_latent(config)


def _weight_variant(folder: Path, part: UNetPart) -> str | None:
    """The variant ("fp16") of the folder's safetensors, None for plain ones; shards count by their index file."""
    stem = "model" if part in _TEXT_CLASSES else "diffusion_pytorch_model"
    for variant in (None, "fp16"):
        infix = "" if variant is None else f".{variant}"
        if any((folder / name).is_file() for name in (
            f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json",
        )):  # fmt: skip
            return variant
    others = sorted(path.name for path in folder.glob("*.bin"))
    found = f"found {', '.join(others)}, a pickle, which is never loaded" if others else "found none"
    raise FileNotFoundError(f"{folder} has no {stem}.safetensors ({found})")


def hide_progress_bars() -> None:
    """Has diffusers and transformers show none of their own while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
