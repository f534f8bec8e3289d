"""Worker processes of this machine: started, fed, watched, and replaced when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from catimage_accel.serve.backend import NoWorker, OnPreview, OnProgress, OnRound, WorkerLost, failure
from catimage_accel.serve.draw_loop import in_one_line
from catimage_accel.serve.messages import Broken, Cancel, Draw, Drawn, Failed, Preview, Ready, Round, Stop
from catimage_accel.serve.worker import WorkerSettings, run_worker

__all__ = ["WorkerPool"]

logger = logging.getLogger(__name__)
RESTART_PAUSES = (0.0, 0.0, 0.5, 2.0, 10.0)
"""Seconds before a worker that was lost so many times in a row, without being ready in between, is started again."""


@dataclass(eq=False)
class _Flying:
    done: asyncio.Future[Drawn]
    on_progress: OnProgress | None
    on_preview: OnPreview | None


@dataclass(eq=False)
class _Worker:
    """One process; ``reserved`` by an image that wants it alone. ``heard`` is when it last said anything, ``broken``
    why the last process could draw nothing, until one is ready."""

    settings: WorkerSettings
    process: Any = None
    outbox: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    flying: dict[str, _Flying] = field(default_factory=dict)
    ready: bool = False
    broken: str | None = None
    reserved: str | None = None
    heard: float = 0.0
    losses: int = 0


class WorkerPool:
    """A ``Backend`` of worker processes, one a device.

    A process that ends (killed, crashed, or silent for ``stall_seconds`` while it has images in flight, upon which it
    is killed) fails its images with WorkerLost and is replaced by a new one. To be used within one event loop.
    """

    def __init__(
        self, workers: Sequence[WorkerSettings], *, stall_seconds: float = 300.0,
        target: Callable[[Connection, WorkerSettings], None] = run_worker,
    ) -> None:  # fmt: skip
        """``target`` is what a worker process does all its life: it can be another way to draw, to compare with."""
        if not workers:
            raise ValueError("workers is empty; accepted: at least 1")
        self._target = target
        # Twice what is in batches, so that one whose images are done finds more at once.
        self.capacity = 2 * sum(settings.max_batch for settings in workers)
        self.unusable: dict[str, str] = {}
        self.restarts = 0
        self.broken: str | None = None
        """Why no worker can ever draw, if that is so."""
        self._workers = [_Worker(settings) for settings in workers]
        self._stall_seconds = stall_seconds
        self._changed = asyncio.Condition()
        self._first_ready: asyncio.Future[None] | None = None
        self._on_round: OnRound = lambda _: None
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()
        # Forked from a process that has imported everything and started no thread, a worker is back in a moment.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([run_worker.__module__, target.__module__])

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._first_ready = self._loop.create_future()
        for worker in self._workers:
            self._run(self._launch(worker))
        self._run(self._watch_for_stalls())
        await self._first_ready

    async def stop(self) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        # A process that is being started is there afterwards, and is stopped with the others.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            worker.outbox.put(Stop())
        running = [worker.process for worker in self._workers if worker.process is not None]
        for process in running:
            await asyncio.to_thread(process.join, 5)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)

    @property
    def workers(self) -> int:
        return sum(worker.ready for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are ready."""
        return [worker.process.pid for worker in self._workers if worker.ready]

    def watch(self, on_round: OnRound) -> None:
        self._on_round = on_round

    async def draw(
        self,
        draw: Draw,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        *,
        alone: bool = False,
    ) -> Drawn:
        worker = await (self._reserve(draw.key) if alone else self._place())
        flying = _Flying(self._loop.create_future(), on_progress, on_preview)
        if not worker.flying:
            worker.heard = time.monotonic()
        worker.flying[draw.key] = flying
        worker.outbox.put(draw)
        try:
            return await flying.done
        except asyncio.CancelledError:
            worker.outbox.put(Cancel(draw.key))
            raise
        finally:
            worker.flying.pop(draw.key, None)
            if worker.reserved == draw.key:
                worker.reserved = None
            await self._tell_change()

    async def _place(self) -> _Worker:
        """The ready worker with the fewest images; NoWorker where all that could be waited for are broken."""
        async with self._changed:
            while not (free := [one for one in self._workers if one.ready and one.reserved is None]):
                if all(one.broken is not None for one in self._workers):
                    raise NoWorker(f"no worker can draw: {self._workers[0].broken}")
                await self._changed.wait()
        return min(free, key=lambda worker: len(worker.flying))

    async def _reserve(self, key: str) -> _Worker:
        """A worker kept free for ``key`` alone: it takes nothing new, and what it has is waited for."""
        worker = await self._place()
        worker.reserved = key
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: worker.broken or (worker.ready and not worker.flying))
        except BaseException:
            worker.reserved = None
            await asyncio.shield(self._tell_change())
            raise
        if worker.broken is None:
            return worker
        worker.reserved = None
        return await self._reserve(key)

    async def _tell_change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _run(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, worker: _Worker) -> None:
        """Starts a process for ``worker``, trying until the machine has the files, memory and threads for it."""
        while True:
            await asyncio.sleep(RESTART_PAUSES[min(worker.losses, len(RESTART_PAUSES) - 1)])
            starting = asyncio.ensure_future(asyncio.to_thread(self._start_process, worker))
            try:
                return await asyncio.shield(starting)
            except asyncio.CancelledError:
                await asyncio.gather(starting, return_exceptions=True)
                raise
            except (OSError, EOFError, RuntimeError) as error:  # of the fork server, and of threads
                worker.losses += 1
                logger.warning("a worker process could not be started: %s; it is tried again", in_one_line(error))

    def _start_process(self, worker: _Worker) -> None:
        ours, theirs = self._context.Pipe()
        outbox: SimpleQueue[Any] = SimpleQueue()
        try:
            process = self._context.Process(
                target=self._target, args=(theirs, worker.settings), name="catimage worker", daemon=True
            )
            process.start()
            worker.process, worker.outbox = process, outbox
            threading.Thread(target=_send, args=(ours, outbox), daemon=True).start()
            threading.Thread(target=self._receive, args=(worker, ours), daemon=True).start()
        except BaseException:
            outbox.put(None)
            ours.close()  # a process that did start ends by this
            raise
        finally:
            theirs.close()

    def _receive(self, worker: _Worker, connection: Any) -> None:
        """In a thread: hands what the worker says to the event loop, and its end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while True:
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    break
                self._loop.call_soon_threadsafe(self._hear, worker, message)
            worker.outbox.put(None)
            self._loop.call_soon_threadsafe(self._lose, worker)

    def _hear(self, worker: _Worker, message: Any) -> None:
        worker.heard = time.monotonic()
        if isinstance(message, Ready):
            worker.ready, worker.broken, worker.losses, self.unusable = True, None, 0, message.unusable
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_result(None)
            self._run(self._tell_change())
        elif isinstance(message, Broken):
            worker.broken = message.reason
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_exception(RuntimeError(message.reason))
                self.broken = message.reason
            logger.error("a worker can draw nothing: %s", message.reason)
            self._run(self._tell_change())
        elif isinstance(message, Round):
            self._on_round(message)
            for key, (step, steps) in message.progress.items():
                flying = worker.flying.get(key)
                if flying is not None and flying.on_progress is not None:
                    flying.on_progress(step, steps)
        elif (flying := worker.flying.get(message.key)) is not None:
            if isinstance(message, Preview):
                if flying.on_preview is not None:
                    flying.on_preview(message)
            elif flying.done.done():
                pass
            elif isinstance(message, Failed):
                flying.done.set_exception(failure(message))
            else:
                flying.done.set_result(message)

    def _lose(self, worker: _Worker) -> None:
        """The process is gone: its images fail, a new one is started."""
        worker.ready = False
        worker.process.join(1)
        reason = f"worker process {worker.process.pid} ended (exit code {worker.process.exitcode})"
        lost, worker.flying = worker.flying, {}
        for flying in lost.values():
            if not flying.done.done():
                flying.done.set_exception(WorkerLost(reason))
        if self._stopping:
            return
        logger.warning("%s with %d images in flight; a new one starts", reason, len(lost))
        worker.losses += 1
        self.restarts += 1
        self._run(self._launch(worker))

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._stall_seconds / 4))
            for worker in self._workers:
                if worker.ready and worker.flying and time.monotonic() - worker.heard > self._stall_seconds:
                    logger.warning("worker process %d says nothing; it is killed", worker.process.pid)
                    worker.ready = False
                    worker.process.kill()


def _send(connection: Any, outbox: SimpleQueue[Any]) -> None:
    """In a thread, for a pipe may be full: sends what is in the outbox until it holds None or the worker is gone."""
    while (message := outbox.get()) is not None:
        try:
            connection.send(message)
        except OSError:
            return
