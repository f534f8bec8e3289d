"""The engine that runs diffusers' modules through ``torch.compile``."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from catimage_accel.accelerate.compiled import DEFAULT, CompiledForward
from catimage_accel.engines.deepcache import enter, inside, leave
from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.lora import UNetPart

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
        unet: UNetPart = "unet",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
    ) -> None:
        """As EagerEngine's, and compiles for two rows; raises EngineUnavailable if torch can't compile here."""
        super().__init__(model, unet, precision, device, shared, quantization)
        text = self.gather(self.encode_prompts(["", ""]))
        try:
            self._denoise_zeros(text)
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
