"""The server on Ray Serve: router replicas, and executor replicas for each set of weights, on a laptop or a cluster."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.ray_cluster import connect
from catimage_accel.serve.backend import DrawFailed, OnPreview, OnProgress, OnRound, WorkerLost, failure
from catimage_accel.serve.messages import Draw, Drawn, Failed, Preview, Round
from catimage_accel.serve.worker import WorkerSettings

__all__ = ["APP", "RayBackend", "RaySettings", "application", "gpu_share", "serve_on_ray"]

APP = "catimage"
ROUTER_CPUS = 0.2


@dataclass(frozen=True)
class RaySettings:
    """How to serve a catalog on a cluster.

    ``address`` as ray.init has it; None: a cluster that runs on this machine, or a new one for as long as this lasts.
    There are 1 to ``max_routers`` router replicas and 1 to ``max_executors`` executor replicas for each set of weights,
    by the images that wait for them. Executors go where their model fits into what is left of a GPU of ``gpu_gb``; in a
    cluster without GPUs each has ``cpus`` processors, or less where there are too few for one of each.
    """

    address: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_routers: int = 2
    max_executors: int = 4
    cpus: float = 1.0
    gpu_gb: float = 24.0
    max_batch: int = 16
    max_queue: int = 256
    latency_target: float | None = 10.0
    token: str | None = None


class RayBackend:
    """A ``Backend`` of Ray Serve's deployments: ``handles`` by their names, ``places`` from a candidate to the name."""

    restarts = 0  # Ray's own metrics count them

    def __init__(self, handles: Mapping[str, Any], places: Mapping[str, str], capacity: int) -> None:
        self.capacity = capacity
        self.unusable: dict[str, str] = {}
        self.workers = 0
        self._handles = handles
        self._places = places
        self._on_round: OnRound = lambda _: None

    async def start(self) -> None:
        for handle in self._handles.values():
            self.unusable |= await handle.unusable.remote()
        self.workers = len(self._handles)

    async def stop(self) -> None:
        self.workers = 0

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
        handle = self._handles[self._places[draw.candidate]]
        stream = handle.options(stream=True).draw.remote(draw, alone)
        try:
            async for told in stream:
                if isinstance(told, Round):
                    self._on_round(told)
                    if on_progress is not None and draw.key in told.progress:
                        on_progress(*told.progress[draw.key])
                elif isinstance(told, Preview):
                    if on_preview is not None:
                        on_preview(told)
                elif isinstance(told, Failed):
                    raise failure(told)
                else:
                    drawn: Drawn = told
                    return drawn
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except RayTaskError as error:
            raise DrawFailed(f"{type(error.cause).__name__}: {error.cause}") from None
        except RayError as error:
            raise WorkerLost(f"{type(error).__name__}: an executor replica was lost") from None
        raise WorkerLost("an executor replica ended before the image was there")


def application(catalog: Catalog, settings: RaySettings, resources: Mapping[str, float]) -> serve.Application:
    """The deployments for a cluster of these ``resources`` ("CPU" and, if it has any, "GPU"): executors for each set of
    weights, and the HTTP application in front of them."""
    gpus = bool(resources.get("GPU"))
    places: dict[str, str] = {}
    executors: dict[str, serve.Application] = {}
    groups: dict[Any, list[Candidate]] = {}
    for candidate in catalog.candidates:
        groups.setdefault(candidate.weights, []).append(candidate)
    cpus = min(settings.cpus, max(0.01, (0.9 * resources["CPU"] - ROUTER_CPUS) / len(groups)))
    for group in groups.values():
        name = "executor-" + re.sub(r"[^A-Za-z0-9-]", "-", group[0].name)
        places |= {candidate.name: name for candidate in group}
        worker = WorkerSettings(
            catalog.folder.absolute(), "cuda" if gpus else "cpu", settings.max_batch,
            None if gpus else max(1, int(settings.cpus)), reproducible=not gpus,
            candidates=tuple(candidate.name for candidate in group),
        )  # fmt: skip
        gpu = gpu_share(catalog, group, settings.gpu_gb) if gpus else 0.0
        executors[name] = _executor(name, settings, cpus, gpu).bind(worker)
    capacity = 2 * settings.max_batch * len(groups) * settings.max_executors

    def build() -> Any:
        # Evaluated in a router replica.
        from catimage_accel.serve.app import AppSettings, create_app
        from catimage_accel.serve.service import Service

        handles = {name: serve.get_deployment_handle(name, APP) for name in executors}
        service = Service(
            Catalog.load(catalog.folder), RayBackend(handles, places, capacity), max_queue=settings.max_queue,
            latency_target=settings.latency_target,
        )  # fmt: skip
        # Replicas share no files, so that there are no URLs of pictures.
        return create_app(service, AppSettings(None, token=settings.token))

    deploy: Any = serve.deployment
    router = deploy(serve.ingress(build)()).options(
        name="router", ray_actor_options={"num_cpus": ROUTER_CPUS}, max_ongoing_requests=4 * settings.max_queue,
        autoscaling_config={
            "min_replicas": 1, "max_replicas": settings.max_routers, "target_ongoing_requests": settings.max_queue / 2,
        },
    )  # fmt: skip
    return router.bind(*executors.values())


def _executor(name: str, settings: RaySettings, cpus: float, gpu: float) -> Any:
    from catimage_accel.serve.ray_replica import ExecutorReplica

    deploy: Any = serve.deployment
    return deploy(ExecutorReplica).options(
        name=name, max_ongoing_requests=2 * settings.max_batch, graceful_shutdown_timeout_s=120,
        ray_actor_options={"num_cpus": round(cpus, 2), "num_gpus": gpu},
        autoscaling_config={
            "min_replicas": 1, "max_replicas": settings.max_executors, "target_ongoing_requests": settings.max_batch,
        },
    )  # fmt: skip


def gpu_share(catalog: Catalog, group: list[Candidate], gpu_gb: float) -> float:
    """The share of a GPU of ``gpu_gb`` that these candidates' model takes, in steps of 0.05, at most 1.

    An estimate: its safetensors files at the width of the precision, half as much again for what runs, and 2 GB.
    """
    model, unet, precision, *_ = group[0].weights
    folder = catalog.resolve_model(model)
    parts = {unet, "text_encoder", "text_encoder_2", *(candidate.vae for candidate in group)}
    files = sum(file.stat().st_size for part in parts for file in (folder / part).glob("*.safetensors"))
    width = {"fp32": 1.0, "int8": 0.25, "fp8": 0.25}.get(precision, 0.5)
    share = (1.5 * width * files / 2**30 + 2.0) / gpu_gb
    return min(1.0, math.ceil(share * 20) / 20)


def serve_on_ray(catalog: Catalog, settings: RaySettings, *, started: Callable[[str], None] = lambda _: None) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; ``started`` is told the address once ready.

    Every machine of the cluster must have this package, and the catalog's folder under the same path. ValueError or
    OSError for settings that can't be; what keeps a model from being loaded is in Ray's logs, and a RuntimeError.
    """
    import ray

    ended = threading.Event()
    with connect(settings.address):
        # Ray sets handlers of its own, which end the process at once.
        handlers = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            serve.start(http_options={"host": settings.host, "port": settings.port}, proxy_location="HeadOnly")
            serve.run(application(catalog, settings, ray.cluster_resources()), name=APP, route_prefix="/")
            started(f"http://{settings.host}:{settings.port}")
            ended.wait()
        finally:
            serve.shutdown()
            for one, handler in handlers.items():
                signal.signal(one, handler)
