"""The server process: sockets, signals, and the order in which things end."""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from catimage_accel.arguments import find_device
from catimage_accel.catalog import Catalog
from catimage_accel.serve.app import AppSettings, create_app
from catimage_accel.serve.pool import WorkerPool
from catimage_accel.serve.service import Service
from catimage_accel.serve.worker import WorkerSettings

__all__ = ["ServeSettings", "serve", "worker_settings"]


@dataclass(frozen=True)
class ServeSettings:
    """How to serve a catalog.

    ``device`` None: every CUDA device, a worker each, or the CPU. A worker steps at most ``max_batch`` images together
    and holds twice as many; ``max_queue`` more wait. ``reproducible``: a picture has the same bits whatever is drawn
    beside it; None: on a processor only, where it costs nothing with the engines that are quickest there.
    ``latency_target`` in seconds, None: load changes no route. After a SIGTERM what was accepted is finished for at
    most ``drain_seconds``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    workers: int | None = None
    max_batch: int = 16
    max_queue: int = 256
    reproducible: bool | None = None
    latency_target: float | None = 10.0
    token: str | None = None
    public_url: str | None = None
    drain_seconds: float = 120.0
    stall_seconds: float = 300.0


def worker_settings(catalog: Catalog, settings: ServeSettings) -> list[WorkerSettings]:
    """One worker a CUDA device, or one on the device named; ``workers`` of them in all if told."""
    if settings.workers is not None and settings.workers < 1:
        raise ValueError(f"workers is {settings.workers}; accepted: at least 1")
    if settings.device is None and torch.cuda.is_available():
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    else:
        devices = [str(find_device(settings.device))]
    number = len(devices) if settings.workers is None else settings.workers
    # Workers on one processor share its cores.
    threads = max(1, torch.get_num_threads() // number) if devices == ["cpu"] and number > 1 else None
    return [
        WorkerSettings(
            catalog.folder.absolute(),
            device,
            settings.max_batch,
            threads,
            reproducible=device == "cpu" if settings.reproducible is None else settings.reproducible,
        )
        for device in (devices[index % len(devices)] for index in range(number))
    ]


class _Server(uvicorn.Server):
    """Ends with exit code 0 when told to end, having finished what it accepted."""

    def __init__(
        self, config: uvicorn.Config, service: Service, pool: WorkerPool, started: Callable[[str], None],
        ready: Callable[[dict[str, str]], None],
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._service = service
        self._pool = pool
        self._started = started
        self._ready: Callable[[dict[str, str]], None] | None = ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._ready is not None and self._service.ready:
            self._ready(self._pool.unusable)
            self._ready = None
        return await super().on_tick(counter) or self._pool.broken is not None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Unlike uvicorn's own, it does not raise the signal again at the end, which would be an exit code of 143.
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {one: signal.signal(one, self.handle_exit) for one in handled}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:
            host, port = sockets[0].getsockname()[:2]
            self._started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def serve(
    catalog: Catalog, settings: ServeSettings, *, started: Callable[[str], None] = lambda _: None,
    ready: Callable[[dict[str, str]], None] = lambda _: None,
) -> None:  # fmt: skip
    """Serves until SIGTERM or SIGINT. ``started`` is told the address once the socket is open, ``ready`` is called once
    images can be drawn, with the candidates that can't be drawn with and why.

    Accepts nothing new from then on, finishes what was accepted, and returns. ValueError for settings that can't be,
    OSError for an address that can't be had, before anything is loaded; RuntimeError if no worker can draw.
    """
    if settings.token is not None and not settings.token.strip():
        raise ValueError("the token is empty; accepted: at least one character that is no space")
    workers = worker_settings(catalog, settings)
    pool = WorkerPool(workers, stall_seconds=settings.stall_seconds)
    with _bound(settings.host, settings.port) as bound, tempfile.TemporaryDirectory(prefix="catimage-") as pictures:
        service = Service(
            catalog, pool, max_queue=settings.max_queue, latency_target=settings.latency_target
        )  # fmt: skip
        app = create_app(
            service, AppSettings(Path(pictures), token=settings.token, public_url=settings.public_url)
        )  # fmt: skip
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=15,
            timeout_graceful_shutdown=int(settings.drain_seconds),
            http="h11", h11_max_incomplete_event_size=16 * 1024,  # httptools takes headers without end
        )  # fmt: skip
        server = _Server(config, service, pool, started, ready)
        server.run(sockets=[bound])
        if pool.broken is not None:
            raise RuntimeError(f"no worker can draw: {pool.broken}")


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise OSError(f"can't listen on {host}:{port}: {error}; another --port or --host may be free") from None
    return bound
