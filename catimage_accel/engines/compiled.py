"""The engine that runs diffusers' modules through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catimage_accel.accelerate.compiled import DEFAULT, CompiledForward
from catimage_accel.engines.deepcache import denoise_with_deep_features, enter, inside, leave
from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.protocol import DeepFeatures, TextBatch
from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["CompiledEngine"]


class CompiledEngine(EagerEngine):
    """An :class:`EagerEngine` whose UNet is compiled when it first runs; text encoder and decoder are as there.

    It compiles once for the first number of rows, once more, for any number, when another comes, and once for a single
    row; then again for other heights and widths, in the same way. DeepCache compiles its three parts likewise. Nothing
    is kept on disk but what torch keeps itself. Where torch's limit on recompilations is reached, what is new from then
    on runs uncompiled, with one warning.
    """

    name = "compiled"
    precisions = ("fp32", "bf16", "fp16")

    def __init__(
        self,
        model: Path,
        unet: str = "unet",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
    ) -> None:
        """As EagerEngine's, and compiles for two rows; raises EngineUnavailable if torch can't compile here."""
        super().__init__(model, unet, precision, device, shared, quantization)
        text = self.gather(self.encode_prompts(["", ""]))
        sample = torch.zeros((2, self.channels, *self.sample_size), device=self.device)
        try:
            self.denoise(sample, torch.tensor([999.0, 1.0], device=self.device), text)
        except RuntimeError as error:  # dynamo's and inductor's own errors, no C++ compiler among them
            # The first line may say no more than which backend raised.
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            raise EngineUnavailable(f"torch.compile of {model / unet} failed: {reason}; use engine 'eager'") from error

    @cached_property
    def _forward(self) -> CompiledForward:
        return CompiledForward(self.unet.forward, DEFAULT)

    @cached_property
    def _parts(self) -> tuple[CompiledForward, CompiledForward, CompiledForward]:
        return CompiledForward(enter, DEFAULT), CompiledForward(inside, DEFAULT), CompiledForward(leave, DEFAULT)

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
