"""A loaded engine at one batch size: its execution context, its buffers, its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from catimage_accel.engines.tensorrt.api import Library
from catimage_accel.engines.tensorrt.contexts import Contexts
from catimage_accel.engines.tensorrt.log import Log
from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["Bucket", "Ordering"]


class Ordering(Protocol):
    """What :class:`~.cuda.Lane` does."""

    device: torch.device

    @property
    def capturing(self) -> bool: ...
    def enqueue(self, launch: Callable[[int], None]) -> None: ...
    def capture(self, launch: Callable[[int], None]) -> Callable[[], None] | None: ...
    def synchronize(self) -> None: ...


class Bucket:
    """Runs the ``profile``-th optimization profile of ``engine``, whose shapes are fixed.

    The context and its buffers belong to this batch size alone, so that a captured graph stays valid. TensorRT-RTX
    captures by itself; for TensorRT the graph is captured after the first run, and used only if its replay gives what
    that run gave.
    """

    def __init__(
        self, library: Library, engine: Any, contexts: Contexts, profile: int, lane: Ordering, log: Log
    ) -> None:
        """Raises EngineUnavailable if there is too little memory or the engine wants what is not known here."""
        self._library, self._lane, self._log = library, lane, log
        self._context = contexts.create()
        if self._context is None:
            raise EngineUnavailable(f"{library.title} made no execution context: {log.reason()}")
        trt = library.load()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]

        def select(stream: int) -> None:
            self._check(self._context.set_optimization_profile_async(profile, stream), f"profile {profile}")

        lane.enqueue(select)
        lane.synchronize()
        for name in inputs:
            shape = tuple(engine.get_tensor_profile_shape(name, profile)[2])
            self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name!r}")
        try:
            unknown = ", ".join(self._context.infer_shapes())
        except RuntimeError as error:
            unknown = " ".join(str(error).split())
        if unknown:
            raise EngineUnavailable(f"{library.title} can't infer shapes in the built engine: {unknown}")
        for name in names:
            dtype = library.torch_dtype(engine.get_tensor_dtype(name))
            shape = tuple(self._context.get_tensor_shape(name))
            try:
                buffer = torch.zeros(shape, dtype=dtype, device=lane.device)
            except torch.OutOfMemoryError:
                raise EngineUnavailable(
                    f"{library.title} has no memory left for {name!r} of shape {shape}; free some, or use 'eager'"
                ) from None
            (self.inputs if name in inputs else self.outputs)[name] = buffer
            self._check(self._context.set_tensor_address(name, buffer.data_ptr()), f"address of {name!r}")
        self._replay: Callable[[], None] | None = None
        self._tried = library.ahead_of_time

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def captured(self) -> bool:
        """A CUDA graph of ours is replayed."""
        return self._replay is not None

    def run(self, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """The outputs, each of ``rows`` rows, in memory that no later call touches; copied on the device only.

        ValueError for inputs that are not the graph's.
        """
        wanted = {name: (rows, *buffer.shape[1:]) for name, buffer in self.inputs.items()}
        given = {name: tuple(value.shape) for name, value in inputs.items()}
        if given != wanted:
            raise ValueError(f"the inputs are {given}; accepted: {wanted}")
        for name, buffer in self.inputs.items():
            buffer[:rows].copy_(inputs[name])
            if rows < len(buffer):
                buffer[rows:].zero_()
        if self._replay is not None and not self._lane.capturing:
            self._replay()
        else:
            self._lane.enqueue(self._launch)
            if not self._tried and not self._lane.capturing:
                self._tried = True
                self._capture()
        return {name: buffer[:rows].clone() for name, buffer in self.outputs.items()}

    def _launch(self, stream: int) -> None:
        self._check(self._context.execute_async_v3(stream), "batch")

    def _capture(self) -> None:
        expected = {name: buffer.clone() for name, buffer in self.outputs.items()}
        replay = self._lane.capture(self._launch)
        if replay is None:
            return
        # A capture can fail without an error and leave a graph that does nothing.
        for buffer in self.outputs.values():
            buffer.zero_()
        replay()
        if all(_same(self.outputs[name], value) for name, value in expected.items()):
            self._replay = replay
            return
        for name, value in expected.items():
            self.outputs[name].copy_(value)

    def _check(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise EngineUnavailable(f"{self._library.title} refused the {what}: {self._log.reason()}")


def _same(actual: Tensor, expected: Tensor) -> bool:
    """But for the order of sums, which kernels may change from run to run."""
    actual, expected = actual.float(), expected.float()
    scale = expected.nan_to_num().abs().max().item()
    return torch.allclose(actual, expected, rtol=0.0, atol=1e-2 * scale, equal_nan=True)
