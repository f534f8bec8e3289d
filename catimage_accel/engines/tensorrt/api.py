"""The two libraries, and what differs between them and their versions: TensorRT 10 and 11, and TensorRT-RTX."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["TENSORRT", "TENSORRT_RTX", "Library"]

_DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64, "INT32": torch.int32, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_OLDEST = {"tensorrt": 10, "tensorrt_rtx": 1}


@dataclass(frozen=True)
class Library:
    """One of the libraries; imported at the first use of anything but its names.

    ``name`` is the engine's name and the pip extra, ``package`` what is imported. ``ahead_of_time``: TensorRT-RTX
    compiles ahead of time for a range of devices and finishes on the device, where TensorRT measures on the device
    that is to run. So TensorRT has a timing cache to keep, and TensorRT-RTX none: asking for one makes it look for a
    device. TensorRT-RTX captures CUDA graphs by itself, and again when shapes or addresses change.
    """

    name: str
    title: str
    package: str
    ahead_of_time: bool

    @property
    def installed(self) -> bool:
        found = find_spec(self.package)
        return found is not None and found.origin is not None  # a folder called "tensorrt" has none

    @property
    def missing(self) -> str:
        """One line for when it is not installed."""
        return f"{self.title} is not installed; pip install 'catimage-accel[{self.name}]'"

    def load(self) -> Any:
        """The imported package; EngineUnavailable if it is missing, does not load or is too old."""
        if not self.installed:
            raise EngineUnavailable(self.missing)
        try:
            module = importlib.import_module(self.package)
            major = int(module.__version__.split(".")[0])
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise EngineUnavailable(
                f"{self.title} does not load: {reason}; pip install --force-reinstall 'catimage-accel[{self.name}]'"
            ) from error
        if major < _OLDEST[self.package]:
            raise EngineUnavailable(
                f"{self.title} is {module.__version__}; accepted: {_OLDEST[self.package]} and later, "
                f"pip install -U 'catimage-accel[{self.name}]'"
            )
        return module

    def version(self) -> str:
        return str(self.load().__version__)

    def create_network(self, builder: Any) -> Any:
        """An empty network whose types are those of the ONNX file: by a flag on TensorRT 10, the only kind since 11."""
        flag = getattr(self.load().NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def compute_capabilities(self) -> tuple[tuple[int, int], ...]:
        """Of the devices that an engine can be built for by name; TensorRT-RTX only."""
        names = [name for name in self.load().ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(sorted((int(name[2:-1]), int(name[-1])) for name in names))

    def torch_dtype(self, dtype: Any) -> torch.dtype:
        """torch's name of one of the library's data types; EngineUnavailable for those that torch has not."""
        try:
            return _DTYPES[dtype.name]
        except KeyError:
            raise EngineUnavailable(f"{self.title} wants a tensor of type {dtype.name}, which torch has not") from None


TENSORRT = Library("tensorrt", "TensorRT", "tensorrt", ahead_of_time=False)
TENSORRT_RTX = Library("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", ahead_of_time=True)
