"""LoRA (arXiv 2106.09685): a UNet whose weights have an adapter's added to them when they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["AdaptedUNet", "UNetPart", "check_lora", "fuse"]

FORMAT = 1  # of how weights are added: another number makes what was built from them stale
_OF_TEXT_ENCODERS = ("text_encoder", "lora_te")
# One such tensor a layer, in diffusers' formats and kohya's.
_DOWN = ("lora_A", "lora.down", "lora_down")


@dataclass(frozen=True)
class AdaptedUNet(os.PathLike[str]):
    """The subfolder ``name`` of a model with a UNet, and the LoRA in ``lora`` that it is loaded with, ``scale`` times.

    It goes wherever the subfolder's name goes: paths made with it are the subfolder's.
    """

    name: str
    lora: Path
    scale: float = 1.0

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"{self.name} + {self.scale:g} x {self.lora.name}"

    def sha256(self, weights: str, lora: str) -> str:
        """Tells the weights that come of it, by the digests of the UNet's own and of the LoRA's file.

        Of what they are made from and not of the sums, whose last bits are the machine's.
        """
        made = {"format": FORMAT, "unet": weights, "lora": lora, "scale": repr(self.scale)}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


UNetPart = str | AdaptedUNet
"""Which UNet of a model: the name of its subfolder, or that with a LoRA."""


def check_lora(lora: Path) -> None:
    """Raises an error of one line unless ``lora`` is a safetensors file of a UNet's adapter that can be loaded here.

    FileNotFoundError, ValueError, or ImportError without peft. Reads the names of the tensors alone. Adapters of text
    encoders, too, are refused: all candidates of a model share those.
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
    if any(name.endswith("dora_scale") for name in names):
        raise ValueError(f"{lora} is DoRA as kohya has it, which would be taken for LoRA; accepted: LoRA, peft's DoRA")
    if find_spec("peft") is None:
        raise ImportError("lora needs peft, which is not installed; `pip install 'catimage-accel[lora]'`")


def fuse(unet: Any, adapted: AdaptedUNet, *, xl: bool) -> None:
    """Adds the LoRA to the weights of ``unet``, a diffusers UNet (``xl``: SDXL's), as diffusers' pipeline would.

    Raises what :func:`check_lora` does, and ValueError for a LoRA of another UNet or one that makes NaN.
    """
    check_lora(adapted.lora)
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

    loader = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin
    try:
        weights, alphas, metadata = loader.lora_state_dict(
            str(adapted.lora.parent), weight_name=adapted.lora.name, use_safetensors=True, local_files_only=True,
            unet_config=unet.config, return_lora_metadata=True,
        )  # fmt: skip
        loader.load_lora_into_unet(weights, alphas, unet, metadata=metadata)
        found = sum(isinstance(module, BaseTunerLayer) for module in unet.modules())
        asked = sum(_is_down(name) for name in weights)
        if found != asked:
            raise ValueError(f"it changes {asked} layers, of which the UNet has {found}")
        unet.fuse_lora(lora_scale=adapted.scale, safe_fusing=True)
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise ValueError(
            f"{adapted.lora} can't be added to the weights of UNet {adapted.name!r}: {reason}; accepted: LoRA made for "
            "this UNet"
        ) from error
    unet.unload_lora()


def _is_down(name: str) -> bool:
    return any(part in name for part in _DOWN)
