"""An executor as a replica of Ray Serve: many requests at once, stepped together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch

from catimage_accel.serve.messages import Broken, Cancel, Draw, Drawn, Failed, Round
from catimage_accel.serve.worker import WorkerSettings, draw_messages

__all__ = ["ExecutorReplica"]


class ExecutorReplica:
    """Draws with the candidates of one set of weights; each call of :meth:`draw` is one image in flight."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Returns when images can be drawn; RuntimeError if they never can be."""
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}
        self._turns = _Turns()
        first: SimpleQueue[Any] = SimpleQueue()
        self._begun = False
        self._first = first
        self._thread = threading.Thread(
            target=draw_messages, args=(self._inbox, self._send, settings), name="executor", daemon=True
        )  # fmt: skip
        self._thread.start()
        told = first.get()
        if isinstance(told, Broken):
            raise RuntimeError(told.reason)
        self._unusable: dict[str, str] = told.unusable

    async def unusable(self) -> dict[str, str]:
        """Candidates that can't be drawn with here, and why."""
        return self._unusable

    def check_health(self) -> None:
        """For Ray, which replaces a replica that raises here."""
        if not self._thread.is_alive():
            raise RuntimeError("the executor's thread has ended")

    async def draw(self, draw: Draw, alone: bool = False) -> AsyncIterator[Any]:
        """What there is to tell of the image, its Drawn or Failed last; a call that ends before frees its slot."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        async with self._turns.turn(alone=alone):
            self._streams[draw.key] = (asyncio.get_running_loop(), queue)
            self._inbox.put(draw)
            try:
                while not isinstance(told := await queue.get(), Drawn | Failed):
                    yield told
                yield told
            finally:
                del self._streams[draw.key]
                self._inbox.put(Cancel(draw.key))  # of one that is done it changes nothing

    def _send(self, message: Any) -> None:
        """In the executor's thread."""
        if not self._begun:
            self._begun = True
            self._first.put(message)
        elif isinstance(message, Round):
            # Every image hears of its own progress, one of them of the batches, so that none is counted twice.
            batches = message.batches
            for key, progress in message.progress.items():
                self._hand(key, replace(message, progress={key: progress}, batches=batches))
                batches = ()
        else:
            self._hand(message.key, message)

    def _hand(self, key: str, message: Any) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            loop, queue = stream
            loop.call_soon_threadsafe(queue.put_nowait, message)


class _Turns:
    """Any number at once, or one alone; who wants to be alone is waited for by those that come later."""

    def __init__(self) -> None:
        self._here = 0
        self._alone = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, *, alone: bool) -> AsyncIterator[None]:
        async with self._alone:
            async with self._changed:
                await self._changed.wait_for(lambda: not alone or self._here == 0)
            if alone:
                yield
                return
            self._here += 1
        try:
            yield
        finally:
            async with self._changed:
                self._here -= 1
                self._changed.notify_all()
