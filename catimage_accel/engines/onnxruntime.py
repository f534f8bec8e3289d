"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from catimage_accel.engines.cache import CacheEntry, EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.machine import int8_weight_bits
from catimage_accel.engines.onnx_export import MODEL_FILE, export
from catimage_accel.engines.unavailable import EngineUnavailable, why_missing

__all__ = ["RUNTIMES", "OnnxRuntime", "OnnxRuntimeRunner"]


class OnnxRuntime:
    """See :class:`~catimage_accel.engines.runner.Runtime`. One session takes every batch size and every size."""

    name = "onnxruntime"
    precisions = ("fp32", "int8")
    rows = (64,)
    any_size = True
    batch_invariant = False

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"onnxruntime runs here on a CPU only, and the device is {device}; use 'tensorrt' or 'eager'"
        return why_missing(("onnx", "onnxruntime"), "cpu")

    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def runner(
        self, component: Component, profile: ShapeProfile, cache: EngineCache, device: torch.device
    ) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(component, cache)


class OnnxRuntimeRunner:
    """See :class:`~catimage_accel.engines.runner.Runner`; the profile's shapes are no limits here.

    The session optimizes the exported file when it is made, 0.3 to 0.8 s for a UNet of 10 M parameters. Keeping what
    that gives would halve it, but it is the same for one kind of CPU only.
    """

    def __init__(self, component: Component, cache: EngineCache) -> None:
        self._component, self._cache = component, cache

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        entry = self._export()
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(
                str(entry.folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes have no other base
            raise _unavailable(self._component, error) from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session
        # NumPy views of CPU tensors: nothing is copied on the way in, and the outputs are made for this call.
        arrays = {name: value.to(torch.float32).contiguous().numpy() for name, value in inputs.items()}
        names = [output.name for output in session.get_outputs()]
        try:
            results = session.run(names, arrays)
        except Exception as error:
            raise _unavailable(self._component, error) from error
        return dict(zip(names, map(torch.from_numpy, results), strict=True))

    def _export(self) -> CacheEntry:
        return export(self._component, self._cache, weight_bits=int8_weight_bits())

    def build(self, advance: Callable[[str], None] = lambda _: None) -> list[CacheEntry]:
        entry = self._export()
        advance(self._component.name)
        return [entry]


def _unavailable(component: Component, error: Exception) -> EngineUnavailable:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EngineUnavailable(f"onnxruntime can't run the {component.name}: {reason}; use engine 'eager'")


RUNTIMES = {"onnxruntime": OnnxRuntime()}
