"""A model's ``forward`` captured in CUDA graphs, one for each kind of call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from catimage_accel.accelerate.snapshot import Snapshot
from catimage_accel.kernels.capture import capturing

DEVICE = "cuda"
MAX_GRAPHS = 8  # of one model; they share the memory of what lies between input and result
WARM_UPS = 2  # calls before the capture: Triton compiles, cuDNN chooses


@dataclass(frozen=True, eq=False)
class Capture:
    """A graph, the tensors that it reads and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Any

    def __call__(self, tensors: list[Tensor]) -> Any:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.result)


class GraphedForward:
    """Replays a graph where a call like this one was captured, and captures it where not.

    Calls are alike in the shapes, strides and dtypes of tensors and in the values of all else. What a graph cannot hold
    runs as it is: calls with gradients, under autocast, on the CPU, or with a timestep that is a number. Anything that
    changes the model but the values of its weights (LoRA, a move, other settings) discards the graphs.
    """

    captures_graphs = True

    def __init__(self, model: nn.Module, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self._model = model
        self._signature = inspect.signature(plain)
        self._captures: dict[Any, Capture] = {}
        self._snapshot: Snapshot | None = None
        self._recorder: Recorder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward, (self._model, self.plain)  # a copy captures the copied model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of ``plain``."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        leaves, spec = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._takes(arguments, tensors):
            return self.plain(*args, **kwargs)
        if self._snapshot is not None and not self._snapshot.holds():
            self._captures, self._snapshot, self._recorder = {}, None, None
        key = (spec, tuple(map(_kind, leaves)))
        # Buffers that are made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self._captures:
                if len(self._captures) == MAX_GRAPHS:
                    del self._captures[next(iter(self._captures))]
                self._captures[key] = self._capture(leaves, spec, tensors)
                self._snapshot = self._snapshot or Snapshot(self._model)
            return self._captures[key](tensors)

    def _takes(self, arguments: dict[str, Any], tensors: list[Tensor]) -> bool:
        sample = arguments["sample"]
        return (
            sample.device.type == DEVICE
            and isinstance(arguments["timestep"], Tensor)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(DEVICE)
            and all(type(tensor) is Tensor for tensor in tensors)
            and not (sample.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _capture(self, leaves: list[Any], spec: Any, tensors: list[Tensor]) -> Capture:
        device = next(tensor.device for tensor in tensors if tensor.device.type == DEVICE)
        inputs = [torch.empty_like(tensor, device=device).copy_(tensor) for tensor in tensors]
        left = iter(inputs)
        arguments = tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        self._recorder = self._recorder or Recorder(device)
        graph, result = self._recorder.capture(lambda: self.plain(**arguments))
        return Capture(graph, inputs, result)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class Recorder:
    """Captures into memory that all of its graphs share, on one stream, without which they would not share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def capture(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of what ``run`` launches, and the result that it writes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            with capturing(graph, self._stream, pool=self._pool):
                result = run()
            caller.wait_stream(self._stream)
        self._pool = graph.pool()
        return graph, result
