"""LoRA (arXiv 2106.09685): a UNet with an adapter's weights added to its own, made once, kept in the engine cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from catimage_accel.candidate import Candidate
from catimage_accel.engines.cache import EngineCache, EngineKey
from catimage_accel.engines.components import Component
from catimage_accel.engines.loading import has_two_text_encoders, load_unet
from catimage_accel.engines.unavailable import why_missing
from catimage_accel.quantize.quantization import FUSED_FILE, stored_dtype
from catimage_accel.storage import file_sha256, write_atomic

__all__ = ["check_lora", "fused_unet", "unet_of"]

_OF_TEXT_ENCODERS = ("text_encoder", "lora_te")
# One such tensor a layer, in diffusers' formats and kohya's.
_DOWN = ("lora_A", "lora.down", "lora_down", "_lora.down")


def unet_of(candidate: Candidate, model: Path, resolve_lora: Callable[[str], Path]) -> str:
    """The subfolder of ``model`` with the candidate's UNet or, with a LoRA, the absolute path of the fused one.

    ``resolve_lora`` turns the candidate's ``lora`` into a file. Errors as :func:`fused_unet`'s.
    """
    if candidate.lora is None:
        return candidate.unet
    return str(fused_unet(model, candidate.unet, resolve_lora(candidate.lora), candidate.lora_scale))


def fused_unet(model: Path, unet: str, lora: Path, scale: float, cache: EngineCache | None = None) -> Path:
    """The folder of ``model/unet`` with ``scale`` times the adapter in file ``lora`` added to its weights.

    In the type the weights are stored in. Made at the first call and kept in ``cache``, by default the user's own.
    Raises what :func:`check_lora` does, ValueError for an adapter of another UNet, ImportError without peft, and
    :class:`EngineUnavailable` where the cache can't hold it.
    """
    check_lora(lora)
    source = {"unet": Component(model, "unet", unet).model_sha256, "lora": file_sha256(lora), "scale": repr(scale)}
    key = EngineKey(
        source["unet"], "unet", "fp32", "", profile="any", runtime="lora", runtime_version=_versions(), device="any",
        os="any", options=(("lora", source["lora"]), ("scale", source["scale"])),
    )  # fmt: skip

    def build(folder: Path) -> None:
        fused = _fused(model, unet, lora, scale)
        nn.Module.to(fused, stored_dtype(model, unet)).save_pretrained(folder)  # its own `to` warns of every change
        write_atomic(folder / FUSED_FILE, (json.dumps(source, indent=1) + "\n").encode())

    return (cache or EngineCache()).get_or_build(key, build).folder


def check_lora(lora: Path) -> None:
    """Raises FileNotFoundError or ValueError, one line, unless ``lora`` is a safetensors file of a UNet's adapter.

    Reads the names of the tensors alone. Adapters of text encoders, too, are refused: all candidates of a model share
    those.
    """
    import safetensors

    if lora.suffix != ".safetensors":
        raise ValueError(f"lora is {str(lora)!r}; accepted: a .safetensors file, other files may be pickles")
    if not lora.is_file():
        raise FileNotFoundError(f"lora is {str(lora)!r}, which is no file; accepted: a .safetensors file")
    try:
        with safetensors.safe_open(lora, "pt") as file:
            names = list(file.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{lora} is not a whole safetensors file: {error}") from None
    if not any(_is_down(name) for name in names):
        raise ValueError(f"{lora} has no LoRA weights, but {names[:1]}; accepted: LoRA in diffusers' or kohya's format")
    if of_text := [name for name in names if name.startswith(_OF_TEXT_ENCODERS)]:
        raise ValueError(
            f"{lora} also changes a text encoder ({of_text[0]}), which the candidates of a model share; accepted: LoRA "
            "of the UNet alone"
        )


def _fused(model: Path, unet: str, lora: Path, scale: float) -> Any:
    if (missing := why_missing(("peft",), "lora")) is not None:
        raise ImportError(missing)
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

    loader = StableDiffusionXLLoraLoaderMixin if has_two_text_encoders(model) else StableDiffusionLoraLoaderMixin
    loaded = load_unet(model, unet, torch.float32)
    try:
        weights, alphas = loader.lora_state_dict(
            str(lora.parent), weight_name=lora.name, use_safetensors=True, local_files_only=True,
            unet_config=loaded.config,
        )  # fmt: skip
        loader.load_lora_into_unet(weights, alphas, loaded)
        found = sum(isinstance(module, BaseTunerLayer) for module in loaded.modules())
        asked = sum(_is_down(name) for name in weights)
        if found != asked:
            raise ValueError(f"it changes {asked} layers, of which the UNet has {found}")
        loaded.fuse_lora(lora_scale=scale, safe_fusing=True)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise ValueError(
            f"{lora} can't be fused into {model / unet}: {reason}; accepted: LoRA made for this UNet"
        ) from error
    loaded.unload_lora()
    return loaded


def _is_down(name: str) -> bool:
    return any(part in name for part in _DOWN)


def _versions() -> str:
    import diffusers

    return f"diffusers {diffusers.__version__}"
