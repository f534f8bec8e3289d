"""What a process that trains is set to before it begins."""

from __future__ import annotations

import signal

import torch


def prepare_process(threads: int) -> None:
    """Takes so many CPU threads (0: as many as torch chooses), and lets a request to stop leave a checkpoint behind.

    A shell's background job ignores SIGINT, and a service manager sends SIGTERM: either raises KeyboardInterrupt then.
    """
    if threads:
        torch.set_num_threads(threads)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
