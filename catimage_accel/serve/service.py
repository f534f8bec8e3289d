"""From a request to its picture: routed, queued, drawn, and drawn again where that failed."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from dataclasses import dataclass, field, replace

import numpy as np

from catimage_accel.catalog import Catalog
from catimage_accel.choosing import Policy
from catimage_accel.serve.admission import Admission, QueueFull
from catimage_accel.serve.backend import Backend, DrawFailed, NoWorker, OutOfMemory, WorkerLost
from catimage_accel.serve.load import LoadGauge, Pressure
from catimage_accel.serve.messages import Draw, Drawn, Preview
from catimage_accel.serve.metrics import Metrics
from catimage_accel.serve.routes import Choice, Reason, Routes

__all__ = [
    "DeadlineMissed",
    "Draining",
    "DrawingFailed",
    "ImageRequest",
    "Observer",
    "Picture",
    "Routed",
    "ServedRoute",
    "Service",
]

logger = logging.getLogger(__name__)
SHARED_CRASHES = 2
"""An image that was in flight when so many workers died is drawn alone from then on: it may be the cause."""
LONE_CRASHES = 2
"""An image that was alone in so many workers that died is not drawn again."""
MEMORY_RETRIES = 3
BENCH_SECONDS = 60.0


Routed = tuple[Choice, dict[str, float]]
"""The policy's choice, and every candidate's predicted quality."""


class DeadlineMissed(RuntimeError):
    """The image could not be there in time."""


class DrawingFailed(RuntimeError):
    """The image could not be drawn, also when tried again. ``reason`` is for the log: it may tell of the machine."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Draining(RuntimeError):
    """The server is about to end and takes nothing new."""


@dataclass(frozen=True)
class ImageRequest:
    """One image. ``client`` is whom the queue shares the work between; ``deadline`` in the event loop's time;
    ``without`` are candidates that can't draw its size."""

    prompt: str
    policy: Policy = field(default_factory=Policy)
    seed: int = 0
    height: int | None = None
    width: int | None = None
    previews: int = 0
    client: str = ""
    deadline: float | None = None
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ServedRoute:
    """Who drew an image, and why. ``cost`` in ``cost_unit``; ``queue_ms`` and ``draw_ms`` are 0 before it is drawn.

    ``reason`` "load": a higher tradeoff than asked for, as many images wait; "deadline": a quicker candidate, to be in
    time; "retry": another one failed.
    """

    candidate: str
    predicted_quality: dict[str, float]
    cost: float
    cost_unit: str
    tradeoff: float | None
    reason: Reason
    queue_ms: float = 0.0
    draw_ms: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A drawn image, uint8 (height, width, 3)."""

    pixels: np.ndarray
    seed: int
    route: ServedRoute


class Observer:
    """Is told how one image fares; this one does nothing."""

    def queued(self, depth: int) -> None:
        """``depth`` images wait, this one included."""

    def routed(self, route: ServedRoute) -> None:
        """A candidate begins, again if another one failed."""

    def progress(self, step: int, steps: int) -> None:
        """So many steps are done."""

    def preview(self, preview: Preview) -> None:
        """What it looks like."""


class Service:
    """Draws requests with a backend's workers. To be used within one event loop.

    ``latency_target`` is what 95 of 100 images are to take, in seconds; as the predicted wait comes near it, requests
    that leave the choice to the router get cheaper candidates (``LoadTradeoff``). None: never.
    """

    def __init__(
        self, catalog: Catalog, backend: Backend, *, max_queue: int = 256, latency_target: float | None = None,
        metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        self.catalog = catalog
        self.backend = backend
        self.routes = Routes(catalog)
        self.admission = Admission(backend.capacity, max_queue)
        self.gauge = LoadGauge(_known_rate(catalog))
        self.metrics = metrics or Metrics()
        self.metrics.watch_queue(lambda: self.admission.waiting, lambda: self.admission.drawing)
        self.metrics.watch_workers(lambda: backend.workers, lambda: backend.restarts)
        self.metrics.watch_tradeoff(lambda: self._raised(catalog.tradeoff))
        backend.watch(self.metrics.stepped)
        self._pressure: Pressure | None = None
        if latency_target is not None:
            self._pressure = Pressure.for_target(latency_target, self.gauge.seconds(self.routes.dearest))
        self._routing = asyncio.Lock()
        self._bench: dict[str, float] = {}
        self._blamed: dict[str, int] = {}
        self.draining = False

    @property
    def ready(self) -> bool:
        return self.backend.workers > 0 and not self.draining

    async def routed(self, prompt: str, policy: Policy, without: frozenset[str] = frozenset()) -> Routed:
        """What the router makes of a prompt, whatever the moment; ValueError for a policy that can't be followed."""
        async with self._routing:  # a router is not shared between threads
            return await asyncio.to_thread(self.routes.choose, prompt, policy, without)

    async def route(self, prompt: str, policy: Policy) -> ServedRoute:
        """As a request would be routed now; errors as :meth:`routed`."""
        first, predicted = await self.routed(prompt, policy)
        return self._told(self._adjusted(first, predicted), predicted)

    async def draw(
        self, request: ImageRequest, observer: Observer | None = None, *, routed: Routed | None = None
    ) -> Picture:
        """The picture. Cancelling the call takes it out of the queue, or frees its slot at the next step.

        ``routed`` is what :meth:`routed` said of it, if it was asked before.
        Raises ValueError for what can't be asked for, QueueFull, DeadlineMissed, DrawingFailed, NoWorker or Draining.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        observer = observer or Observer()
        began = time.perf_counter()
        first, predicted = routed or await self.routed(request.prompt, request.policy, request.without)
        likely = self._adjusted(first, predicted, request.deadline, request.without)
        cost = self.routes.costs[likely.candidate.name]
        outcome, choice = "cancelled", first
        try:
            async with asyncio.timeout_at(request.deadline) as timeout:
                observer.queued(self.admission.waiting + 1)
                async with self.admission.place(request.client, cost):
                    queue_ms = (time.perf_counter() - began) * 1000
                    choice = self._adjusted(first, predicted, request.deadline, request.without)
                    drawn, choice = await self._drawn(request, first, choice, predicted, observer)
            outcome = "drawn"
        except TimeoutError:
            if not timeout.expired():
                raise
            outcome = "deadline"
            raise DeadlineMissed(
                f"the image could not be drawn by its deadline; {self.admission.waiting} images wait"
            ) from None
        except QueueFull:
            outcome = "rejected"
            raise
        except (DrawingFailed, NoWorker):
            outcome = "failed"
            raise
        finally:
            seconds = time.perf_counter() - began
            spent = self.routes.costs[choice.candidate.name]
            self.metrics.ended(outcome, choice.candidate.name, seconds, spent, self.routes.dearest)
        draw_ms = (time.perf_counter() - began) * 1000 - queue_ms
        return Picture(
            drawn.pixels, request.seed, replace(self._told(choice, predicted), queue_ms=queue_ms, draw_ms=draw_ms)
        )

    def _told(self, choice: Choice, predicted: dict[str, float]) -> ServedRoute:
        """A choice as clients are told of it."""
        name = choice.candidate.name
        return ServedRoute(
            name, predicted, self.routes.costs[name], self.catalog.cost_unit, choice.tradeoff, choice.reason
        )

    @property
    def predicted_wait(self) -> float:
        """Seconds until an image that comes now would be begun."""
        return self.gauge.seconds(self.admission.outstanding_cost)

    def _adjusted(
        self,
        first: Choice,
        predicted: dict[str, float],
        deadline: float | None = None,
        without: frozenset[str] = frozenset(),
    ) -> Choice:
        seconds, left = None, None
        if deadline is not None:
            left = deadline - asyncio.get_running_loop().time()
            seconds = {name: self.gauge.seconds(cost) for name, cost in self.routes.costs.items()}
        return self.routes.adjust(
            first,
            predicted,
            pressure=self._raised,
            seconds_left=left,
            seconds=seconds,
            without=self._unusable() | without,
        )

    def _raised(self, asked: float) -> float:
        """What the load makes of a tradeoff."""
        if self._pressure is None:
            return asked
        return self._pressure.tradeoff(asked, self.routes.max_tradeoff, self.predicted_wait)

    def _unusable(self) -> frozenset[str]:
        now = time.monotonic()
        self._bench = {name: until for name, until in self._bench.items() if until > now}
        return frozenset(self._bench) | frozenset(self.backend.unusable)

    async def _drawn(
        self, request: ImageRequest, first: Choice, choice: Choice, predicted: dict[str, float], observer: Observer
    ) -> tuple[Drawn, Choice]:
        """Draws until there is an image, or no sense in trying on; with the choice that drew it."""
        crashes = failures = 0
        failed: frozenset[str] = frozenset()
        while True:
            name = choice.candidate.name
            observer.routed(self._told(choice, predicted))
            draw = Draw(
                secrets.token_hex(8),
                request.prompt,
                name,
                request.seed,
                request.height,
                request.width,
                request.previews,
            )
            self.gauge.begin()
            spent = 0.0
            try:
                drawn = await self.backend.draw(
                    draw, observer.progress, observer.preview, alone=crashes >= SHARED_CRASHES
                )
                spent = self.routes.costs[name]
            except WorkerLost as error:
                crashes += 1
                self.metrics.retries.labels(reason="worker").inc()
                logger.warning("image %s: %s", draw.key, error)
                if crashes >= SHARED_CRASHES + LONE_CRASHES:
                    raise DrawingFailed(
                        f"the workers that drew this image died, {LONE_CRASHES} of them with no other image; "
                        "another prompt or candidate may work",
                        str(error),
                    ) from None
            except DrawFailed as error:
                failures += 1
                memory = isinstance(error, OutOfMemory)
                failed |= {name}
                logger.warning("candidate %s failed to draw: %s", name, error)
                other = self._instead(first, choice, predicted, memory, failed | request.without)
                if other is None or failures > (MEMORY_RETRIES if memory else 1):
                    why = "there is too little memory for it" if memory else "drawing raised an error"
                    raise DrawingFailed(f"candidate {name} could not draw this image: {why}", str(error)) from None
                self.metrics.retries.labels(reason="memory" if memory else "candidate").inc()
                choice = other
            else:
                self._judge(failed, name)
                return drawn, choice
            finally:
                self.gauge.end(spent)

    def _instead(
        self, first: Choice, choice: Choice, predicted: dict[str, float], memory: bool, without: frozenset[str]
    ) -> Choice | None:
        """Who tries after a failure; a candidate that the client named tries again, unless memory is short."""
        if first.reason == "candidate":
            return None if memory else choice
        if memory:
            cheaper = self.routes.cheaper_than(choice.candidate.name, without | self._unusable())
            return None if cheaper is None else Choice(cheaper, "retry", choice.tradeoff)
        other = self._adjusted(first, predicted, without=without)
        return None if other.candidate.name in without else replace(other, reason="retry")

    def _judge(self, failed: frozenset[str], drew: str) -> None:
        """A candidate that failed where another one drew is at fault; after the second time it is left out a while."""
        self._blamed.pop(drew, None)
        for name in failed - {drew}:
            self._blamed[name] = self._blamed.get(name, 0) + 1
            if self._blamed[name] >= 2:
                logger.warning("candidate %s is left out for %.0f seconds", name, BENCH_SECONDS)
                self._bench[name] = time.monotonic() + BENCH_SECONDS


def _known_rate(catalog: Catalog) -> float | None:
    """Cost a second by costs.json, with each candidate's quickest engine on whatever device; None without times."""
    quickest: dict[str, float] = {}
    for engines in catalog.milliseconds.values():
        for times in engines.values():
            for name, sizes in times.items():
                quickest[name] = min([quickest.get(name, math.inf), *sizes.values()])
    rates = [1000 * cost / quickest[name] for name, cost in catalog.costs.items() if name in quickest]
    return float(np.median(rates)) if rates else None
