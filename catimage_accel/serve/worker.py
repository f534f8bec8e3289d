"""A worker process: one executor, fed and called off image by image over a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from catimage_accel.catalog import Catalog
from catimage_accel.engines.loading import hide_progress_bars
from catimage_accel.engines.text_encoders import PROMPT_CUT_OFF
from catimage_accel.executor import Executor
from catimage_accel.profiling import catalog_executor
from catimage_accel.serve.draw_loop import DrawLoop, in_one_line, usable_candidates
from catimage_accel.serve.messages import Broken, Cancel, Draw, FromWorker, Ready

__all__ = ["MakeLoop", "WorkerSettings", "draw_messages", "run_worker"]

WARM_AFTER = 1.0
"""Seconds without an image after which a batch size is tried: who asks for one after the other would wait for it."""


@dataclass(frozen=True)
class WorkerSettings:
    """``folder`` is the catalog's; ``device`` a torch device; ``threads`` torch's, None for its own choice.

    ``reproducible`` as :class:`Executor` has it. ``candidates``: those of the catalog to draw with, None for all.
    """

    folder: Path
    device: str
    max_batch: int
    threads: int | None = None
    reproducible: bool = False
    candidates: tuple[str, ...] | None = None


MakeLoop = Callable[[Catalog, Executor], DrawLoop]


def run_worker(connection: Connection, settings: WorkerSettings, make_loop: MakeLoop = DrawLoop) -> None:
    """The whole life of a worker process: until told to stop, or its server is gone."""
    # The server decides when a worker ends: at Ctrl-C it still wants what is in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        draw_messages(inbox, connection.send, settings, make_loop)
    except OSError:  # the server is gone
        return


def draw_messages(
    inbox: SimpleQueue[Any],
    send: Callable[[FromWorker], None],
    settings: WorkerSettings,
    make_loop: MakeLoop = DrawLoop,
) -> None:
    """Loads the catalog and draws what comes into ``inbox``, until that says Stop.

    ``send`` takes what there is to tell: Ready first, or Broken and nothing else.
    """
    # It is for who calls the pipeline: here each client's long prompts would fill the server's log.
    warnings.filterwarnings("ignore", PROMPT_CUT_OFF)
    try:
        hide_progress_bars()
        catalog = Catalog.load(settings.folder)
        if settings.candidates is not None:
            catalog = replace(catalog, candidates=tuple(catalog.candidate(name) for name in settings.candidates))
        device = torch.device(settings.device)
        executor = catalog_executor(
            catalog, device, max_batch=settings.max_batch, reproducible=settings.reproducible
        )  # fmt: skip
        unusable = usable_candidates(catalog, executor)
    except Exception as error:
        send(Broken(in_one_line(error)))
        return
    send(Ready(unusable))
    loop = make_loop(catalog, executor)
    cold, warm_at = True, 0.0
    while True:
        wait = None if loop.idle else 0.0
        if cold and loop.idle:
            wait = max(0.0, warm_at - time.monotonic())
            if wait == 0.0 and inbox.empty():
                cold = loop.warm()
                continue
        for message in _messages(inbox, wait):
            if isinstance(message, Draw):
                loop.take(message)
            elif isinstance(message, Cancel):
                loop.cancel(message.key)
            else:
                return
        if not loop.idle:
            for told in loop.round():
                send(told)
            warm_at = time.monotonic() + WARM_AFTER


def _messages(inbox: SimpleQueue[Any], wait: float | None) -> Sequence[Any]:
    """All that has arrived; waits at most ``wait`` seconds for the first, with None until it comes."""
    messages = []
    with contextlib.suppress(Empty):
        messages.append(inbox.get(block=wait != 0.0, timeout=wait))
        while True:
            messages.append(inbox.get_nowait())
    return messages


def _read(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            # Nobody is left to draw for: end even in the midst of a long step.
            os._exit(0)
        inbox.put(message)
