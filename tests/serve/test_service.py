"""A request through queue, workers and failures. The workers here fail as told; real ones are in test_pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catimage_accel.catalog import Catalog
from catimage_accel.choosing import Policy
from catimage_accel.serve.admission import QueueFull
from catimage_accel.serve.backend import DrawFailed, OnPreview, OnProgress, OnRound, OutOfMemory, WorkerLost
from catimage_accel.serve.messages import Draw, Drawn
from catimage_accel.serve.service import (
    DeadlineMissed,
    Draining,
    DrawingFailed,
    ImageRequest,
    Observer,
    ServedRoute,
    Service,
)

Behaviour = Callable[[Draw, bool], Exception | float]


class FailingWorkers:
    """A backend of which each image takes the seconds, or has the end, that ``behaviour`` says of it."""

    def __init__(self, behaviour: Behaviour = lambda *_: 0.0, capacity: int = 4) -> None:
        self.behaviour = behaviour
        self.capacity = capacity
        self.unusable: dict[str, str] = {}
        self.workers, self.restarts = 1, 0
        self.drawn: list[tuple[str, bool]] = []
        self.cancelled = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def watch(self, on_round: OnRound) -> None: ...

    async def draw(
        self,
        draw: Draw,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        *,
        alone: bool = False,
    ) -> Drawn:
        self.drawn.append((draw.candidate, alone))
        found = self.behaviour(draw, alone)
        if isinstance(found, Exception):
            raise found
        try:
            await asyncio.sleep(found)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Drawn(draw.key, np.full((4, 4, 3), draw.seed % 256, dtype=np.uint8), 1.0)


@pytest.fixture(scope="module")
def catalog(tiny_catalog: Path) -> Catalog:
    return Catalog.load(tiny_catalog)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def drawn_by(catalog: Catalog, workers: FailingWorkers, request: ImageRequest) -> Any:
    async def main() -> Any:
        return await Service(catalog, workers).draw(request)

    return run(main())


DEAR = ImageRequest("a dog, a cat and three crowns", Policy(tradeoff=0.0), seed=7)


def once(error: Exception) -> Behaviour:
    left = [error]
    return lambda *_: left.pop() if left else 0.0


def test_a_picture_tells_who_drew_it_and_why(catalog: Catalog) -> None:
    picture = drawn_by(catalog, FailingWorkers(), DEAR)
    assert picture.seed == 7
    assert int(picture.pixels[0, 0, 0]) == 7
    route = picture.route
    assert (route.candidate, route.reason, route.tradeoff) == ("dear-4", "tradeoff", 0.0)
    assert route.cost == catalog.costs["dear-4"]
    assert set(route.predicted_quality) == set(catalog.costs)
    assert route.draw_ms > 0


def test_a_lost_worker_costs_no_picture(catalog: Catalog) -> None:
    workers = FailingWorkers(once(WorkerLost("killed")))
    assert drawn_by(catalog, workers, DEAR).route.candidate == "dear-4"
    assert workers.drawn == [("dear-4", False), ("dear-4", False)]


def test_a_poisoned_request_is_drawn_alone_and_then_given_up(catalog: Catalog) -> None:
    workers = FailingWorkers(lambda *_: WorkerLost("segmentation fault"))
    with pytest.raises(DrawingFailed, match="workers that drew this image died"):
        drawn_by(catalog, workers, DEAR)
    assert [alone for _, alone in workers.drawn] == [False, False, True, True]


def test_a_candidate_that_raises_is_replaced_once(catalog: Catalog) -> None:
    workers = FailingWorkers(lambda draw, _: DrawFailed("broken") if draw.candidate == "dear-4" else 0.0)
    picture = drawn_by(catalog, workers, DEAR)
    assert picture.route.reason == "retry"
    assert picture.route.candidate == "middle-3"
    assert len(workers.drawn) == 2


def test_a_request_that_no_candidate_draws_fails_clearly(catalog: Catalog) -> None:
    workers = FailingWorkers(lambda *_: DrawFailed("RuntimeError: /secret/path"))
    with pytest.raises(DrawingFailed, match="middle-3 could not draw this image: drawing raised an error") as caught:
        drawn_by(catalog, workers, DEAR)
    assert "secret" not in str(caught.value)
    assert "secret" in caught.value.reason
    assert len(workers.drawn) == 2


def test_a_named_candidate_is_tried_again_and_never_replaced(catalog: Catalog) -> None:
    workers = FailingWorkers(once(DrawFailed("hiccup")))
    named = ImageRequest("a dog", Policy(candidate="middle-3"))
    assert drawn_by(catalog, workers, named).route.candidate == "middle-3"
    assert [name for name, _ in workers.drawn] == ["middle-3", "middle-3"]
    with pytest.raises(DrawingFailed):
        drawn_by(catalog, FailingWorkers(lambda *_: DrawFailed("broken")), named)


def test_too_little_memory_falls_to_smaller_candidates(catalog: Catalog) -> None:
    workers = FailingWorkers(lambda draw, _: 0.0 if draw.candidate == "cheap-2" else OutOfMemory("too much"))
    assert drawn_by(catalog, workers, DEAR).route.candidate == "cheap-2"
    assert [name for name, _ in workers.drawn] == ["dear-4", "middle-3", "cheap-2"]


def test_a_candidate_at_fault_twice_is_left_out_and_one_bad_request_is_not_its_fault(catalog: Catalog) -> None:
    async def main() -> None:
        workers = FailingWorkers(lambda draw, _: DrawFailed("broken") if draw.candidate == "dear-4" else 0.0)
        service = Service(catalog, workers)
        for _ in range(2):
            await service.draw(DEAR)
        workers.drawn.clear()
        await service.draw(DEAR)
        assert workers.drawn == [("middle-3", False)]

        poisoned = FailingWorkers(lambda draw, _: DrawFailed("bad prompt") if draw.prompt == "poison" else 0.0)
        service = Service(catalog, poisoned)
        for _ in range(5):
            with pytest.raises(DrawingFailed):
                await service.draw(ImageRequest("poison", Policy(tradeoff=0.0)))
        poisoned.drawn.clear()
        await service.draw(DEAR)
        assert poisoned.drawn == [("dear-4", False)]

    run(main())


def test_candidates_that_the_workers_cannot_load_draw_nothing(catalog: Catalog) -> None:
    workers = FailingWorkers()
    workers.unusable = {"dear-4": "no weights"}
    assert drawn_by(catalog, workers, DEAR).route.candidate == "middle-3"


def test_candidates_that_cannot_draw_the_size_do_not_stand_in(catalog: Catalog) -> None:
    sized = replace(DEAR, without=frozenset({"middle-3"}))
    workers = FailingWorkers(lambda draw, _: OutOfMemory("too much") if draw.candidate == "dear-4" else 0.0)
    assert drawn_by(catalog, workers, sized).route.candidate == "cheap-2"
    workers = FailingWorkers(lambda *_: DrawFailed("broken"))
    with pytest.raises(DrawingFailed):
        drawn_by(catalog, workers, sized)
    assert [name for name, _ in workers.drawn] == ["dear-4", "cheap-2"]


@pytest.mark.parametrize("queued", [False, True], ids=["while-drawn", "while-queued"])
def test_a_missed_deadline_calls_the_image_off(catalog: Catalog, queued: bool) -> None:
    async def main() -> None:
        workers = FailingWorkers(lambda *_: 0.0 if not queued else 1.0, capacity=1)
        workers.behaviour = lambda *_: 1.0
        service = Service(catalog, workers)
        first = asyncio.create_task(service.draw(DEAR)) if queued else None
        await asyncio.sleep(0.1)
        with pytest.raises(DeadlineMissed):
            await service.draw(ImageRequest("a dog", deadline=asyncio.get_running_loop().time() + 0.1))
        assert workers.cancelled == (0 if queued else 1)
        if first is not None:
            await first
        assert service.admission.drawing == service.admission.waiting == 0

    run(main())


def test_a_cancelled_request_frees_its_place(catalog: Catalog) -> None:
    async def main() -> None:
        workers = FailingWorkers(lambda *_: 60.0, capacity=1)
        service = Service(catalog, workers)
        tasks = [asyncio.create_task(service.draw(DEAR)) for _ in range(3)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert workers.cancelled == 1
        assert service.admission.drawing == service.admission.waiting == 0

    run(main())


def test_a_full_queue_is_refused(catalog: Catalog) -> None:
    async def main() -> list[Any]:
        service = Service(catalog, FailingWorkers(lambda *_: 0.05, capacity=1), max_queue=1)
        return await asyncio.gather(*(service.draw(DEAR) for _ in range(4)), return_exceptions=True)

    assert sum(isinstance(one, QueueFull) for one in run(main())) == 2


def test_a_draining_server_takes_nothing_new(catalog: Catalog) -> None:
    async def main() -> None:
        service = Service(catalog, FailingWorkers())
        service.draining = True
        assert not service.ready
        with pytest.raises(Draining):
            await service.draw(DEAR)

    run(main())


def test_pressure_makes_routes_cheaper_and_its_end_makes_them_dear_again(catalog: Catalog) -> None:
    async def main() -> tuple[list[str], str]:
        workers = FailingWorkers(lambda draw, _: catalog.costs[draw.candidate] / 100, capacity=1)
        service = Service(catalog, workers, latency_target=0.6)
        crowd = await asyncio.gather(*(service.draw(DEAR) for _ in range(40)))
        after = await service.draw(DEAR)
        assert {picture.route.reason for picture in crowd if picture.route.candidate == "cheap-2"} == {"load"}
        return [picture.route.candidate for picture in crowd], after.route.candidate

    crowd, after = run(main())
    assert crowd.count("cheap-2") > 20
    assert after == "dear-4"


def test_an_observer_is_told_of_queue_and_routes(catalog: Catalog) -> None:
    told: list[Any] = []

    class Listener(Observer):
        def queued(self, depth: int) -> None:
            told.append(depth)

        def routed(self, route: ServedRoute) -> None:
            told.append(route.candidate)

    async def main() -> None:
        workers = FailingWorkers(lambda draw, _: DrawFailed("x") if draw.candidate == "dear-4" else 0.0)
        await Service(catalog, workers).draw(DEAR, Listener())

    run(main())
    assert told == [1, "dear-4", "middle-3"]


def test_metrics_count_what_was_drawn_spent_and_saved(catalog: Catalog) -> None:
    async def main() -> str:
        service = Service(catalog, FailingWorkers())
        await service.draw(ImageRequest("a dog", Policy(candidate="cheap-2")))
        await service.draw(ImageRequest("a dog", Policy(candidate="dear-4")))
        return service.metrics.exposition().decode()

    lines = run(main()).splitlines()
    assert 'catimage_images_total{candidate="cheap-2",outcome="drawn"} 1.0' in lines
    assert 'catimage_cost_total{kind="spent"} 9.0' in lines
    assert 'catimage_cost_total{kind="saved"} 7.0' in lines
    assert 'catimage_route_share{candidate="dear-4"} 0.5' in lines
    assert "catimage_queue_depth 0.0" in lines


def test_the_first_guess_of_the_rate_is_that_of_the_quickest_engines(catalog: Catalog) -> None:
    times = {"cheap-2": {"1": 2000.0, "4": 1000.0}, "middle-3": {"1": 3000.0}, "dear-4": {"1": 9000.0, "4": 8000.0}}
    slower = {name: {size: 3 * time for size, time in sizes.items()} for name, sizes in times.items()}
    timed = replace(catalog, milliseconds={"some device": {"eager": slower, "openvino": times, "onnxruntime": slower}})

    async def main() -> float | None:
        return Service(timed, FailingWorkers()).gauge.rate

    # GFLOP a second: 1, 3 and 8 of them in 1, 3 and 8 seconds.
    assert run(main()) == pytest.approx(1.0)
