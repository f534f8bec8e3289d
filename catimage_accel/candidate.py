"""A candidate: one way to turn a prompt into an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from catimage_accel.lora import AdaptedUNet, UNetPart
from catimage_accel.storage import Strict, validated

QUANTIZED_PRECISIONS = ("int8", "fp8")
OWN_VAE = "vae"  # the subfolder of a model folder's own VAE
LATER_FIELDS = {"vae": OWN_VAE, "guidance_rescale": 0.0, "lora_scale": 1.0}
"""Fields that came with later versions, at what older ones did: files leave them out there, so that those read them."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=80)]
Sampler = Literal["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm"]
_Part = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class _Options(Strict):
    deepcache_interval: Annotated[int, Field(ge=1, le=1000)] | None = None


class CandidateFields(Strict):
    name: Name
    model: Annotated[str, Field(min_length=1)]
    steps: Annotated[int, Field(ge=1, le=1000)]
    sampler: Sampler
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    unet: _Part = "unet"
    lora: Annotated[str, Field(min_length=1)] | None = None
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0
    vae: _Part = OWN_VAE
    engine: Literal[
        "auto", "eager", "fused", "compiled", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "triton"
    ] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32"
    quantization: Annotated[str, Field(min_length=1)] | None = None
    options: _Options = _Options()


@dataclass(frozen=True)
class Candidate:
    """One way to turn a prompt into an image.

    ``model`` is a diffusers folder, relative to the catalog's folder or absolute, or a hub id; ``unet`` the subfolder
    of it with this candidate's UNet, ``vae`` the one with the VAE that decodes its latents. ``lora`` is a LoRA's
    .safetensors file, relative to the catalog's folder or absolute, a hub id, or "owner/name/file.safetensors" on the
    hub; ``lora_scale`` (-10 to 10) times its weights are added to the UNet's. ``steps`` is 1 to 1000;
    ``guidance_scale`` 0 to 100, and up to 1 means none (one UNet row an image); ``guidance_rescale`` 0 to 1 is
    diffusers' (arXiv 2305.08891). ``timestep_spacing`` is the sampler's, None for what the model's scheduler config
    says: turbo and lightning models want "trailing" (arXiv 2305.08891, table 2). ``engine`` "auto" is the one measured
    fastest, for its weights or else for its precision, "eager" where none was measured. ``precision`` "int8" and "fp8"
    need ``quantization``, a folder that `catimage quantize` wrote, relative to the catalog's folder or absolute.
    ``options``: ``deepcache_interval`` (int, the UNet's deep features are recomputed every so many steps, and at the
    last).
    Any other value raises ValueError.
    """

    name: str
    model: str
    steps: int
    sampler: str
    guidance_scale: float
    unet: str = "unet"
    engine: str = "auto"
    precision: str = "fp32"
    quantization: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    vae: str = OWN_VAE
    guidance_rescale: float = 0.0
    timestep_spacing: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0

    def __post_init__(self) -> None:
        values = {**{key: getattr(self, key) for key in CandidateFields.model_fields}, "options": dict(self.options)}
        fields = validated(CandidateFields, values, f"candidate {self.name!r}")
        quantized = self.precision in QUANTIZED_PRECISIONS
        if quantized != (self.quantization is not None):
            raise ValueError(
                f"candidate {self.name!r}: precision is {self.precision!r} and quantization {self.quantization!r}; "
                f"accepted: a folder that `catimage quantize` wrote with {' or '.join(QUANTIZED_PRECISIONS)}, none else"
            )
        if self.lora is None and fields.lora_scale != 1.0:
            raise ValueError(f"candidate {self.name!r}: lora_scale is {self.lora_scale!r} without lora; accepted: both")
        object.__setattr__(self, "lora_scale", float(fields.lora_scale))
        object.__setattr__(self, "guidance_scale", float(fields.guidance_scale))
        object.__setattr__(self, "guidance_rescale", float(fields.guidance_rescale))
        object.__setattr__(self, "options", values["options"])

    def unet_part(self, resolve_lora: Callable[[str], Path]) -> UNetPart:
        """Which UNet of the model's folder draws; ``resolve_lora`` turns ``lora`` into a file."""
        if self.lora is None:
            return self.unet
        return AdaptedUNet(self.unet, resolve_lora(self.lora), self.lora_scale)

    @property
    def weights(self) -> tuple[str, str, str, str | None, str | None, float]:
        """What tells UNets apart: candidates that are equal in this share engines and batches, whatever their VAE."""
        return self.model, self.unet, self.precision, self.quantization, self.lora, self.lora_scale
