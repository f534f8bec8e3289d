"""A stand-in for TensorRT and its device that computes on the CPU from the addresses that it is given.

So a wrong buffer shows as a wrong result. What it runs is noise = 2 * sample + timestep.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from catimage_accel.engines.components import ShapeProfile
from catimage_accel.engines.tensorrt.api import Library

PROFILE = ShapeProfile((2, 4), height=3, width=5, tokens=2, text_features=3)
STREAM = 7
CPU = torch.device("cpu")


class Mode(enum.Enum):
    INPUT = enum.auto()
    OUTPUT = enum.auto()


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (rows, 4, 3, 5), "timestep": (rows,), "noise": (rows, 4, 3, 5)}


def expected(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return sample * 2 + timestep.view(-1, 1, 1, 1)


def memory(address: int, shape: tuple[int, ...]) -> numpy.ndarray:
    """The float32 values at an address."""
    count = int(numpy.prod(shape))
    return numpy.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


class Context:
    """An execution context that takes nothing but the calls, in an order, that TensorRT's documents ask for."""

    def __init__(self) -> None:
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.fails = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        self.shapes[name] = shape
        return shape == shapes(PROFILE.rows[self.profile])[name]

    def infer_shapes(self) -> list[str]:
        return sorted({"sample", "timestep"} - set(self.shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return shapes(self.shapes["sample"][0])[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if self.fails:
            return False
        rows = self.shapes["sample"][0]
        values = {name: memory(self.addresses[name], shape) for name, shape in shapes(rows).items()}
        values["noise"][:] = values["sample"] * 2 + values["timestep"].reshape(-1, 1, 1, 1)
        return True


class Kernels:
    """TensorRT-RTX's runtime cache: it grows by what is compiled, and takes up no other device's."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        if valid := set(blob) <= {ord("k")}:
            self.content = blob
        return valid

    def serialize(self) -> bytes:
        return self.content


class Engine:
    num_io_tensors = 3

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.kernels = Kernels()

    def get_tensor_name(self, index: int) -> str:
        return ("sample", "timestep", "noise")[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.OUTPUT if name == "noise" else Mode.INPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [shapes(PROFILE.rows[profile])[name]] * 3

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: self.kernels, set_runtime_cache=lambda kernels: kernels is self.kernels,
        )  # fmt: skip

    def create_execution_context(self, _: Any) -> Context:
        self.contexts.append(Context())
        self.kernels.content += b"k"
        return self.contexts[-1]


@dataclass(frozen=True)
class StandIn(Library):
    """A library that loads the plans called "good"."""

    engines: list[Engine] = field(default_factory=list, hash=False)

    def load(self) -> Any:
        engines = self.engines

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                if plan != b"good":
                    self.logger.log(SimpleNamespace(name="ERROR"), "version 9\nis not 10")
                    return None
                engines.append(Engine())
                return engines[-1]

        return SimpleNamespace(
            __version__="10.0", Runtime=Runtime, ILogger=type("ILogger", (), {"__init__": lambda self: None}),
            TensorIOMode=Mode, ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE=1),
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
        )  # fmt: skip


def stand_in(*, ahead_of_time: bool) -> StandIn:
    return StandIn("stand-in", "Stand-in", "stand_in", ahead_of_time)


class Lane:
    """A stream on the CPU; capturing "works", is "refused", or comes to a graph that is "empty"."""

    def __init__(self, device: torch.device = CPU, graph: str = "works") -> None:
        self.device, self.graph, self.capturing = device, graph, False
        self.replays = 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        yield

    def enqueue(self, launch: Callable[[int], None]) -> None:
        launch(STREAM)

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None] | None:
        def replay() -> None:
            self.replays += 1
            if self.graph == "works":
                launch(STREAM)

        return None if self.graph == "refused" else replay

    def synchronize(self) -> None:
        pass
