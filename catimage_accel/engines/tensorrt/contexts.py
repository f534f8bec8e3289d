"""Execution contexts of a loaded engine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from catimage_accel.engines.tensorrt.api import Library
from catimage_accel.storage import write_atomic

__all__ = ["Contexts"]


class Contexts:
    """Makes contexts, each with memory for its own optimization profile only.

    TensorRT-RTX compiles an engine's kernels on the device when they are first needed; ``kernels`` is the file that
    keeps them for the next process. A file of another device, driver or version is not taken up, and written anew.
    """

    def __init__(self, library: Library, engine: Any, kernels: Path) -> None:
        trt = library.load()
        self._engine, self._kernels = engine, kernels
        self._strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self._config: Any = None
        if library.ahead_of_time:
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(self._strategy)
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._compiled = self._config.create_runtime_cache()
            if kernels.is_file():
                self._compiled.deserialize(kernels.read_bytes())
            self._config.set_runtime_cache(self._compiled)
            self._known = self._serialized()

    def create(self) -> Any:
        """A new context, None if there is too little memory."""
        return self._engine.create_execution_context(self._strategy if self._config is None else self._config)

    def keep(self) -> None:
        """Writes the kernels that were compiled since; a folder that can't be written costs the next process time."""
        if self._config is None or (found := self._serialized()) == self._known:
            return
        self._known = found
        with suppress(OSError):
            write_atomic(self._kernels, found)

    def _serialized(self) -> bytes:
        blob = self._compiled.serialize()
        return b"" if blob is None else bytes(memoryview(blob))
