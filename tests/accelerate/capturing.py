"""Stand-ins for what takes long or needs a device: torch's code generation, CUDA graphs, kernels on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from catimage_accel.kernels.dispatch import choose_impl

plain_compile = torch.compile


class Compiler:
    """``torch.compile`` with a backend that traces as the real one does, and generates no code."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.graphs = 0

    def __call__(self, forward: Any, **arguments: Any) -> Any:
        self.calls.append(arguments)
        others = {name: value for name, value in arguments.items() if name != "mode"}
        return plain_compile(forward, backend=self.backend, **others)

    def backend(self, graph: Any, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph


class Graph:
    """Replays by calling again, into the tensors of the first result."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self.run, self.result = run, result

    def replay(self) -> None:
        for own, new in zip(tree_leaves(self.result), tree_leaves(self.run()), strict=True):
            own.copy_(new)

    def pool(self) -> int:
        return id(self)


def on_triton(monkeypatch: pytest.MonkeyPatch, *ops: str) -> list[str]:
    """Has the ops run on Triton, in the interpreter; the list gets an op's name each time one does."""
    launched: list[str] = []
    for op in ops:

        def choose(impl: str | None, name: str, *tensors: Any, op: str = op, **cuda: Any) -> str:
            launched.append(op)
            return choose_impl("triton", name, *tensors)

        monkeypatch.setattr(sys.modules[f"catimage_accel.kernels.{op}"], "choose_impl", choose)
    return launched
