"""TensorRT and TensorRT-RTX as runtimes for graph engines."""

from __future__ import annotations

import torch

from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.tensorrt.api import TENSORRT, TENSORRT_RTX, Library
from catimage_accel.engines.tensorrt.runner import TensorRTRunner
from catimage_accel.engines.unavailable import EngineUnavailable, why_missing

__all__ = ["RUNTIMES", "TensorRTRuntime"]


class TensorRTRuntime:
    """See :class:`~catimage_accel.engines.runner.Runtime`.

    "int8" runs in INT8 where the library chooses to; the entry's layers.json tells where. For TensorRT-RTX its makers
    promise INT8 for the weights of matrix multiplications alone.
    """

    precisions = ("fp32", "fp16", "bf16", "int8", "fp8")
    rows = (1, 2, 4, 8, 16)
    any_size = False
    batch_invariant = False

    def __init__(self, library: Library) -> None:
        self.library = library
        self.name = library.name

    def why_not(self, device: torch.device) -> str | None:
        if not self.library.installed:
            return self.library.missing
        if (missing := why_missing(("onnx",), self.name)) is not None:
            return missing
        if device.type != "cuda" or not torch.cuda.is_available():
            return f"{self.library.title} needs a CUDA device, and the device is {device}; use 'openvino' on a CPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 5):
            return f"{self.library.title} needs compute capability 7.5; {device} has {_dotted(capability)}; use 'eager'"
        if self.library.ahead_of_time:
            try:
                known = self.library.compute_capabilities()
            except EngineUnavailable as error:
                return str(error)
            if capability not in known and capability < known[-1]:
                names = ", ".join(_dotted(one) for one in known)
                return (
                    f"{self.library.title} supports compute capability {names} and later, and {device} has "
                    f"{_dotted(capability)}; use engine 'tensorrt'"
                )
        return None

    def version(self) -> str:
        return self.library.version()

    def runner(
        self, component: Component, profile: ShapeProfile, cache: EngineCache, device: torch.device
    ) -> TensorRTRunner:
        """Builds at the first call or by :meth:`TensorRTRunner.build`, TensorRT-RTX on machines without a device too.

        EngineUnavailable if the library is missing; ValueError for a precision that it has not.
        """
        if component.precision not in self.precisions:
            raise ValueError(f"precision is {component.precision!r}; accepted: {', '.join(self.precisions)}")
        self.library.load()
        return TensorRTRunner(self.library, component, profile, cache, device)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


RUNTIMES = {library.name: TensorRTRuntime(library) for library in (TENSORRT, TENSORRT_RTX)}
