"""What quantizes a UNet: the scales of its layers, and the folder they are kept in. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from catimage_accel.lora import AdaptedUNet, UNetPart
from catimage_accel.storage import Strict, file_sha256, read_json, validated, write_atomic

__all__ = ["LayerQuantization", "Quantization", "check_checkpoint", "weights_sha256"]

JSON_NAME, SCALES_NAME = "quantization.json", "scales.safetensors"
FORMAT_VERSION = 1
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Fields(Strict):
    version: Literal[1]
    format: Literal["int8", "fp8"]
    recipe: Annotated[str, Field(min_length=1)]
    source_sha256: _Sha256
    scales_sha256: _Sha256
    calibration: dict[str, Any]
    kept: dict[str, str]
    errors: dict[str, Annotated[float, Field(ge=0)]]


@dataclass(frozen=True, eq=False)
class LayerQuantization:
    """The scales of one Conv2d or Linear: all float32, finite and above 0; anything else raises ValueError.

    Attributes:
        weight_amax: (out_channels,) The largest absolute weight of each output channel, after division by
            ``input_scale``.
        input_amax: () The largest absolute input that is not clipped, after multiplication by ``input_scale``.
        output_amax: () The same of the output (bias included), where that is quantized too; else None.
        input_scale: (in_features,) SmoothQuant (arXiv 2211.10438) of a Linear: inputs are multiplied by it, weights
            divided.
    """

    weight_amax: Tensor
    input_amax: Tensor
    output_amax: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name, axes in (("weight_amax", 1), ("input_amax", 0), ("output_amax", 0), ("input_scale", 1)):
            value = getattr(self, name)
            if value is None and name in ("output_amax", "input_scale"):
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim != axes:
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"{name} is {found}; accepted: a float32 tensor with {axes} axes")
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                bad = value.flatten()[~(torch.isfinite(value) & (value > 0)).flatten()][0].item()
                raise ValueError(f"{name} has the value {bad:g}; accepted: finite values above 0")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by name."""
        named = {name: getattr(self, name) for name in ("weight_amax", "input_amax", "output_amax", "input_scale")}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Quantization:
    """How a UNet is quantized, and what that was measured to do.

    In "int8" a real x becomes the integer clamp(round_half_even(x * 127 / amax), -128, 127) and q stands for
    q * amax / 127; in "fp8" x * 448 / amax is clamped to [-448, 448] and rounded to E4M3.

    Attributes:
        format: "int8" or "fp8".
        recipe: What made it, a name of ``recipes.RECIPES``.
        layers: Module name in the UNet -> its scales.
        kept: Module name -> why that Conv2d or Linear stays in high precision.
        source_sha256: :func:`weights_sha256` of the UNet it was made from.
        calibration: What the scales were measured on: candidates, prompts, steps, samples, prompts_sha256.
        errors: Module name -> relative squared error of the UNet's output when only that layer is quantized.
    """

    format: str
    recipe: str
    layers: Mapping[str, LayerQuantization]
    kept: Mapping[str, str]
    source_sha256: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that changes results: the format, the source's weights, every layer's scales."""
        parts = [f"{FORMAT_VERSION} {self.format} {self.source_sha256}"]
        for name in sorted(self.layers):
            for kind, value in self.layers[name].tensors().items():
                parts.append(f"{name} {kind} {hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest()}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes both files, each at once or not at all; the JSON, written last, holds the other's SHA-256."""
        import safetensors.torch

        scales = safetensors.torch.save({
            f"{name}.{kind}": value.cpu().contiguous()
            for name, layer in self.layers.items()
            for kind, value in layer.tensors().items()
        })  # fmt: skip
        described = {
            "version": FORMAT_VERSION, "format": self.format, "recipe": self.recipe,
            "source_sha256": self.source_sha256, "scales_sha256": hashlib.sha256(scales).hexdigest(),
            "calibration": dict(self.calibration), "kept": dict(self.kept), "errors": dict(self.errors),
        }  # fmt: skip
        text = json.dumps(described, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(folder / SCALES_NAME, scales)
        write_atomic(folder / JSON_NAME, text.encode())

    @classmethod
    def load(cls, folder: Path) -> Quantization:
        """What :meth:`save` wrote. FileNotFoundError for a missing file, ValueError for a changed one, in one line."""
        import safetensors
        import safetensors.torch

        for name in (JSON_NAME, SCALES_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; accepted: a folder of `catimage quantize`")
        fields = validated(_Fields, read_json(folder / JSON_NAME), str(folder / JSON_NAME))
        data = (folder / SCALES_NAME).read_bytes()
        if hashlib.sha256(data).hexdigest() != fields.scales_sha256:
            raise ValueError(
                f"{folder / SCALES_NAME} is not the file that {JSON_NAME} names (SHA-256 differs); make both again "
                "with `catimage quantize`"
            )
        try:
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / SCALES_NAME} is not a safetensors file: {error}") from None
        by_layer: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition(".")
            by_layer.setdefault(name, {})[kind] = value
        layers = {}
        for name, found in by_layer.items():
            try:
                layers[name] = LayerQuantization(**found)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{folder / SCALES_NAME}: {name}: {error}") from None
        return cls(
            fields.format, fields.recipe, layers, fields.kept, fields.source_sha256, fields.calibration, fields.errors
        )

    def check_source(self, model: Path, unet: UNetPart = "unet") -> None:
        """ValueError unless the weights of ``model/unet`` are those this was made from."""
        found = weights_sha256(model, unet)
        if found != self.source_sha256:
            raise ValueError(
                f"{model / unet} has weights of sha256 {found[:12]}..., but the quantization was made from "
                f"{self.source_sha256[:12]}...; make it again with `catimage quantize`"
            )


def weights_sha256(model: Path, unet: UNetPart = "unet") -> str:
    """SHA-256 of the safetensors file of ``model/unet``; with several shards, of their digests in the order of names.

    With a LoRA, of these and what is added to them. FileNotFoundError if there is none.
    """
    digests = [_file_sha256(path) for path in _weight_files(model / unet)]
    found = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return unet.sha256(found, _file_sha256(unet.lora)) if isinstance(unet, AdaptedUNet) else found


def check_checkpoint(model: Path, unet: str = "unet") -> None:
    """ValueError for stored weights that can't be quantized, because they are integers or were quantized before.

    To be asked before they are loaded: loading them as float32 would convert them without a word.
    """
    import safetensors

    config = model / unet / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        raise ValueError(f"{config} has a quantization_config; accepted: a UNet that was not quantized before")
    for path in _weight_files(model / unet):
        try:
            with safetensors.safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        for name, kind in kinds.items():
            if kind not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{path}: {name} is {kind}; accepted: weights in F32, F16 or BF16, which were not quantized before"
                )


def _weight_files(folder: Path) -> list[Path]:
    for infix in ("", ".fp16"):
        single = folder / f"diffusion_pytorch_model{infix}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"diffusion_pytorch_model.safetensors.index{infix}.json"
        if index.is_file():
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors; accepted: a UNet in safetensors")


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; its index names it")
    status = path.stat()
    # Within a tick of the file system's clock a second change would not show in the time.
    settled = time.time_ns() - status.st_mtime_ns > 2_000_000_000
    digest = _digest if settled else _digest.__wrapped__
    return digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, _size: int, _modified: int) -> str:
    return file_sha256(path)
