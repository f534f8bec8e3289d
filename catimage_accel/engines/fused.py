"""The engine that runs a UNet in PyTorch through the package's fused kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from catimage_accel.accelerate import fuse
from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.kernels import attention, cpu
from catimage_accel.kernels.build import CPU
from catimage_accel.kernels.dispatch import TRITON_INSTALLED
from catimage_accel.lora import UNetPart

__all__ = ["FusedEngine"]


class FusedEngine(EagerEngine):
    """An :class:`EagerEngine` over the kernels that :func:`~catimage_accel.accelerate.accelerate` puts into a UNet.

    Results are those of the eager engine but for rounding. Text encoder and decoder are as there.
    """

    name = "fused"
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    attend = staticmethod(attention)

    def __init__(
        self,
        model: Path,
        unet: UNetPart = "unet",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
    ) -> None:
        """As EagerEngine's; raises EngineUnavailable, before any weight is read, where the kernels can't run."""
        if (problem := self.why_not(torch.device(device))) is not None:
            raise EngineUnavailable(problem)
        super().__init__(model, unet, precision, device, shared, quantization)
        fuse(self.unet)

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """Why the kernels can't run on ``device``, with the remedy; None where they can."""
        if device.type == "cpu":
            return None if cpu.BUILT else f"its kernels for the CPU are not built: {CPU.how_to_build}"
        if device.type != "cuda":
            return f"its kernels need a CUDA device or a CPU, and the device is {device}; use 'eager'"
        return None if TRITON_INSTALLED else "triton not installed: pip install 'catimage-accel[triton]'"
