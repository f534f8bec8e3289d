"""The engine that runs diffusers' modules as they are, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from catimage_accel.candidate import OWN_VAE
from catimage_accel.engines.components import Component
from catimage_accel.engines.deepcache import PARTS, UNetParts, denoise_with_deep_features
from catimage_accel.engines.loading import (
    check_model_folder,
    check_precision,
    latent_size,
    load_unet,
    load_vae,
    pixels_per_latent,
    read_config,
)
from catimage_accel.engines.protocol import DeepFeatures, EncodedPrompt, KeyValue, TextBatch, TextState
from catimage_accel.engines.text import CachedText, attend
from catimage_accel.engines.text_encoders import TextEncoders
from catimage_accel.lora import UNetPart
from catimage_accel.quantize.fake import fake_quantized

__all__ = ["EagerEngine", "SharedParts"]

class SharedParts:
    """Text encoders and decoders of one model folder, for all engines over UNets of that folder.

    Weights are in ``dtype``, except that a float16 decoder whose config says ``force_upcast`` is kept in float32.
    """

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.text = TextEncoders(model, dtype, device)
        self.scale_factor = pixels_per_latent(read_config(model / OWN_VAE / "config.json"))
        self._vaes: dict[str, Any] = {}

    def vae(self, name: str = OWN_VAE) -> Any:
        """The VAE in the subfolder ``name``, loaded at the first call; raises for weights that can't be read."""
        if name not in self._vaes:
            vae = load_vae(self.model, self.dtype, name)
            if self.dtype == torch.float16 and vae.config.force_upcast:
                vae = vae.float()
            self._vaes[name] = vae.to(device=self.device, memory_format=torch.channels_last)
        return self._vaes[name]

    @torch.inference_mode()
    def decode(self, latents: Tensor, vae: str = OWN_VAE) -> Tensor:
        """Images (n, 3, height, width), float32 around [-1, 1], of latents (n, C, h, w), by the VAE of that name."""
        decoder = self.vae(vae)
        latents = latents.float() / decoder.config.scaling_factor
        latents = latents.to(device=self.device, dtype=decoder.dtype, memory_format=torch.channels_last)
        return decoder.decode(latents, return_dict=False)[0].float()


class EagerEngine:
    """A ``UNet2DConditionModel`` of a diffusers folder in PyTorch, with the parts it shares with its siblings.

    Weights and activations are float32, bfloat16 or float16 by ``precision``; "int8" and "fp8" round them as the
    quantized engines do, but compute in floating point, which is exact and saves no time. Samples come and go in
    float32, so that what a sampler accumulates over the steps is never rounded to 16 bits. See
    :class:`~.protocol.Engine` for the calls.
    """

    name = "eager"
    batch_invariant = False  # PyTorch chooses other kernels for other numbers of rows
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "fp8")
    attend = staticmethod(attend)  # what mixes a prompt's keys and values

    def __init__(
        self,
        model: Path,
        unet: UNetPart = "unet",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
    ) -> None:
        """Loads ``model/unet`` and, unless ``shared`` is given, the other parts of ``model``; VAEs at the first decode.

        ``quantization`` is the folder with the scales of an "int8" or "fp8" UNet.

        Raises FileNotFoundError or ValueError, before any weight is read, for folders that can't be run.
        """

        self.device = torch.device(device)
        self.dtype = check_precision(precision, self.device)
        check_model_folder(model, unet)
        if shared is not None and (shared.dtype, shared.device) != (self.dtype, self.device):
            raise ValueError(
                f"shared is in {shared.dtype} on {shared.device}; accepted: {self.dtype} on {self.device}, as the UNet"
            )
        self.shared = SharedParts(model, self.dtype, self.device) if shared is None else shared
        loaded = load_unet(model, unet, self.dtype)
        if (scales := Component(model, "unet", unet, precision, quantization).scales) is not None:
            loaded = fake_quantized(loaded, scales)
        self.unet = loaded.to(device=self.device, memory_format=torch.channels_last)
        self._text = CachedText(self.unet, self.attend)
        self._states: WeakValueDictionary[str, TextState] = WeakValueDictionary()
        self._unconditional: TextState | None = None  # every guided image needs it: kept, unlike the prompts' states

        self.channels: int = self.unet.config.in_channels
        self.sample_size = latent_size(self.unet.config)
        self.scale_factor: int = self.shared.scale_factor

    @property
    def _forward(self) -> Callable[..., Any]:
        """What runs the UNet."""
        return self.unet

    @property
    def _parts(self) -> UNetParts:
        """What runs its three parts, with DeepCache."""
        return PARTS

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """Why it can't run on ``device``, one line with the remedy; None if it can."""
        return None

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> list[TextState]:
        states = {prompt: state for prompt in prompts if (state := self._states.get(prompt)) is not None}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in states]
        if missing:
            found = self._with_own_layers(missing, self.shared.text.encode(missing))
            states |= dict(zip(missing, found, strict=True))
            self._states.update(states)
        return [states[prompt] for prompt in prompts]

    @torch.inference_mode()
    def unconditional(self) -> TextState:
        if self._unconditional is None:
            self._unconditional = self._with_own_layers([""], [self.shared.text.unconditional()])[0]
        return self._unconditional

    @torch.inference_mode()
    def gather(self, states: Sequence[TextState]) -> TextBatch:
        return TextBatch.gather(states)

    @torch.inference_mode()
    def with_layers(self, text: TextBatch) -> TextBatch:
        """The batch that another engine gathered, with this one's keys and values."""
        return TextBatch(text.hidden, self._keys_values(text.hidden), text.pooled)

    @torch.inference_mode()
    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextBatch,
        added: Mapping[str, Any] | None = None,
        *,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        sample = sample.to(dtype=self.dtype, memory_format=torch.channels_last)
        if deep is not None:
            noise = denoise_with_deep_features(
                self.unet, self._text, sample, timestep, text, added, deep, self._parts
            )  # fmt: skip
        else:
            self._text.current = text
            noise = self._forward(sample, timestep, text.hidden, added_cond_kwargs=added, return_dict=False)[0]
        return noise.to(dtype=torch.float32, memory_format=torch.contiguous_format)

    def _denoise_zeros(self, text: TextBatch) -> None:
        """The UNet on a row of zeros for each of ``text``'s, at its usual size."""
        rows = len(text.hidden)
        sample = torch.zeros(rows, self.channels, *self.sample_size, device=self.device)
        added = text.added_conditions(*(side * self.scale_factor for side in self.sample_size))
        self.denoise(sample, torch.zeros(rows, device=self.device), text, added)

    def decode(self, latents: Tensor, vae: str = OWN_VAE) -> Tensor:
        return self.shared.decode(latents, vae)

    def _with_own_layers(self, prompts: Sequence[str], encoded: Sequence[EncodedPrompt]) -> list[TextState]:
        layers = self._keys_values(torch.stack([one.hidden for one in encoded]))
        return [
            TextState(prompt, one, tuple((key[row].clone(), value[row].clone()) for key, value in layers))
            for row, (prompt, one) in enumerate(zip(prompts, encoded, strict=True))
        ]

    def _keys_values(self, hidden: Tensor) -> list[KeyValue]:
        return self._text.keys_values(self.unet.process_encoder_hidden_states(hidden, None))
