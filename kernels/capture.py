"""Captures of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph`` on ``stream``; afterwards the caller's stream is the current one again.

    Also where the capture fails: torch 2.11 leaves the thread on the capture's stream then.
    """
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream, **options):
        yield
