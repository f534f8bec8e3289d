"""The CUDA side of running an engine: streams, and capture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.kernels.capture import capturing

__all__ = ["Lane", "current"]


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one, which is where the libraries build, load and allocate; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Lane:
    """Orders the work of one runner: after what the caller has enqueued, before what the caller enqueues next.

    A runner's buffers are used by one call after another, whatever streams the callers are on. Where the caller is on
    the default stream, which the libraries synchronise the device for, the engine runs on a stream of the lane's own.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises EngineUnavailable if there is no such CUDA device."""
        if device.type != "cuda" or not torch.cuda.is_available():
            raise EngineUnavailable(f"the device is {device}; accepted: a CUDA device, which runs what is built here")
        self.device = device
        self._own = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    @property
    def capturing(self) -> bool:
        """The caller captures a CUDA graph of its own."""
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around all that one call enqueues."""
        with current(self.device):
            # Order within a captured graph is the graph's; an event from outside may not be waited for in it.
            if self._last is not None and not self.capturing:
                torch.cuda.current_stream().wait_event(self._last)
            yield
            if not self.capturing:
                self._last = torch.cuda.current_stream().record_event()

    def enqueue(self, launch: Callable[[int], None]) -> None:
        """``launch`` with the handle of the stream to use."""
        current = torch.cuda.current_stream()
        if current.cuda_stream != 0:
            launch(current.cuda_stream)
            return
        self._own.wait_stream(current)
        launch(self._own.cuda_stream)
        current.wait_stream(self._own)

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None] | None:
        """What replays ``launch`` on the stream then current; None if it can't be captured.

        ``launch`` has to have run once before.
        """
        graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream()
        self._own.wait_stream(caller)
        try:
            with capturing(graph, self._own, capture_error_mode="thread_local"):
                launch(self._own.cuda_stream)
        except RuntimeError:
            return None
        finally:
            caller.wait_stream(self._own)
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
