"""What a process that trains is set to before it begins, and what it knows of those beside it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

STOPPING = (signal.SIGINT, signal.SIGTERM)


def prepare_process(threads: int) -> None:
    """Takes so many CPU threads (0: as many as torch chooses), and lets a request to stop leave a checkpoint behind.

    A shell's background job ignores SIGINT, and a service manager sends SIGTERM: either raises KeyboardInterrupt then.
    """
    if threads:
        torch.set_num_threads(threads)
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler)


@contextmanager
def stopping_waits() -> Iterator[None]:
    """A request to stop within the block acts at its end, so that what belongs together is done together.

    Only in the main thread, where Python handles signals; what is ignored, or ends the process outright, stays so.
    """
    waiting: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {int(number): handler for number in STOPPING if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            handlers[number](number, frame)


def processes() -> int:
    """How many processes were launched to train together, by ``accelerate launch`` or torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone(what: str) -> None:
    """ValueError if this is one of several processes."""
    if processes() > 1:
        raise ValueError(
            f"{what} was launched in {processes()} processes; accepted: 1, without `accelerate launch` or torchrun"
        )


def own_device(device: torch.device) -> torch.device:
    """``device``; if it is a GPU and this is one of several processes, the GPU of this one.

    It is made the current one, too, as kernels expect. ValueError for more processes on this machine than GPUs.
    """
    if device.type != "cuda" or processes() == 1:
        return device
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if number >= (found := torch.cuda.device_count()):
            raise ValueError(f"process {number} of this machine has no GPU; accepted: up to {found} processes here")
        torch.cuda.set_device(number)
    return torch.device("cuda", number)
