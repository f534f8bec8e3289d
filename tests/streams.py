"""Streams and captures without a device, which leave the thread on a stream where torch 2.11 does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch


class Stream:
    """One that does nothing."""

    numbers = count(1)

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = next(self.numbers)

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        pass


class Streams:
    """The stream that is current, and the stream and the pool of each capture."""

    def __init__(self) -> None:
        self.current = Stream()
        self.captures: list[tuple[Stream, Any]] = []

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        """``torch.cuda.stream``."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, *, stream: Stream, pool: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """``torch.cuda.graph``: its end raises before the stream is set back."""
        before, self.current = self.current, stream
        self.captures.append((stream, pool))
        try:
            yield
        except Exception as error:
            raise RuntimeError("the capture was invalidated") from error
        self.current = before


def without_a_device(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Puts them in the place of torch's."""
    streams = Streams()
    stand_ins = {
        "Stream": Stream, "CUDAGraph": Graph, "stream": streams.use, "graph": streams.capture,
        "current_stream": lambda device=None: streams.current, "device": contextlib.nullcontext,
        "is_available": lambda: True, "synchronize": lambda device=None: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return streams
