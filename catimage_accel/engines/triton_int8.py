"""The engine that runs a quantized UNet in PyTorch on INT8 tensor cores, through the package's own kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.int8.choice import LayerChoice
from catimage_accel.engines.int8.swap import swap_layers
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.kernels.dispatch import TRITON_INSTALLED
from catimage_accel.lora import UNetPart
from catimage_accel.quantize.quantization import Quantization

__all__ = ["TritonInt8Engine"]

LEAST_CAPABILITY = (8, 0)


class TritonInt8Engine(EagerEngine):
    """An :class:`EagerEngine` whose UNet multiplies INT8 numbers, as its quantization has them.

    Norms, GEGLU and SiLU write INT8 where a quantized layer reads them. What is not quantized is in float16 on CUDA, in
    float32 on a CPU, where the kernels' definitions run: exact, for tests, and slow. The result is that of
    ``quantize.fake.fake_quantized`` but for rounding, except for layers that ``layers`` says were measured to be slower
    in INT8, which are not rounded.
    """

    name = "triton"
    precisions: tuple[str, ...] = ("int8",)

    layers: tuple[LayerChoice, ...]
    """What every convolution and linear layer of the UNet runs in, and why."""

    def __init__(
        self,
        model: Path,
        unet: UNetPart = "unet",
        precision: str = "int8",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
    ) -> None:
        """Loads as EagerEngine does, and puts the layers of ``quantization``, a folder of `catimage quantize`, in INT8.

        Raises, besides what EagerEngine does, ValueError or FileNotFoundError for a quantization that is missing or of
        another UNet, and EngineUnavailable, before any weight is read, where the kernels can't run.
        """
        if precision not in self.precisions:
            raise ValueError(f"precision is {precision!r} with engine 'triton'; accepted: 'int8'")
        if quantization is None:
            raise ValueError("quantization is None; accepted with engine 'triton': a folder of `catimage quantize`")
        device = torch.device(device)
        if device.type == "cuda" and (problem := self.why_not(device)) is not None:
            raise EngineUnavailable(problem)
        scales = Quantization.load(quantization)
        if scales.format != "int8":
            raise ValueError(f"{quantization} holds {scales.format!r} scales; accepted with engine 'triton': 'int8'")
        scales.check_source(model, unet)
        plain = "fp16" if device.type == "cuda" else "fp32"
        super().__init__(model, unet, plain, device, shared)
        self.layers = swap_layers(self.unet, scales, plain, self._run_once, self.device)

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """Why the kernels can't run on ``device``, with the remedy; None where they can."""
        if device.type != "cuda":
            return f"its kernels need a CUDA device, and the device is {device}; use 'openvino' or 'onnxruntime'"
        if not TRITON_INSTALLED:
            return "triton not installed: pip install 'catimage-accel[triton]'"
        if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            name, least = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY))
            return f"{name} has compute capability {'.'.join(map(str, found))}, INT8 kernels need {least}; use 'eager'"
        return None

    @torch.inference_mode()
    def _run_once(self) -> None:
        self._denoise_zeros(self.gather([self.unconditional()]))
