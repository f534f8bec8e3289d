"""Fair, bounded admission."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catimage_accel.serve.admission import Admission, QueueFull


class Desk:
    """Images that come at once, each drawn for one turn of the loop; keeps the order in which they were let in."""

    def __init__(self, capacity: int = 1, max_queue: int = 1000) -> None:
        self.admission = Admission(capacity, max_queue)
        self.order: list[str] = []
        self.most = 0

    async def image(self, client: str, cost: float, name: str | None = None) -> None:
        async with self.admission.place(client, cost):
            self.order.append(name or client)
            self.most = max(self.most, self.admission.drawing)
            await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def test_clients_share_by_cost_not_by_number() -> None:
    async def main() -> list[str]:
        desk = Desk()
        many = [desk.image("many", 1.0) for _ in range(20)]
        dear = [desk.image("dear", 5.0) for _ in range(4)]
        await asyncio.gather(*many, *dear)
        return desk.order

    order = run(main())
    # While both wait, five images at 1 go with each at 5.
    for shares in (order[:6], order[:12], order[:18]):
        assert shares.count("many") == pytest.approx(5 * shares.count("dear"), abs=5)
    assert order.count("dear") == 4


def test_dear_images_are_not_starved_by_a_stream_of_cheap_ones() -> None:
    async def main() -> int:
        desk = Desk()
        begun = asyncio.Event()

        async def cheap(number: int) -> None:
            await desk.image("cheap", 4.0, f"cheap {number}")
            if number < 500 and not begun.is_set():
                # One comes for each one that goes, so that the queue is never empty.
                await cheap(number + 2)

        async def dear() -> None:
            await asyncio.sleep(0)
            await desk.image("dear", 50.0)
            begun.set()

        await asyncio.gather(cheap(0), cheap(1), dear())
        return desk.order.index("dear")

    assert run(main()) < 20


def test_one_clients_images_keep_their_order() -> None:
    async def main() -> list[str]:
        desk = Desk()
        await asyncio.gather(*(desk.image("one", cost, str(n)) for n, cost in enumerate((3.0, 1.0, 2.0, 1.0))))
        return desk.order

    assert run(main()) == ["0", "1", "2", "3"]


def test_no_more_are_let_in_than_there_is_capacity() -> None:
    async def main() -> int:
        desk = Desk(capacity=3)
        await asyncio.gather(*(desk.image(f"client {n % 4}", 1.0) for n in range(30)))
        assert desk.admission.drawing == 0
        assert desk.admission.outstanding_cost == 0
        return desk.most

    assert run(main()) == 3


def test_a_full_queue_refuses_at_once_and_keeps_those_that_wait() -> None:
    async def main() -> list[Any]:
        desk = Desk(capacity=1, max_queue=2)
        return await asyncio.gather(*(desk.image("one", 1.0) for _ in range(5)), return_exceptions=True)

    outcomes = run(main())
    assert [isinstance(one, QueueFull) for one in outcomes] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("images", "fits"), [(3, True), (4, False)], ids=["drawn-and-queued", "one-more-than-there-is-room"]
)
def test_room_is_for_whole_requests(images: int, fits: bool) -> None:
    admission = Admission(capacity=1, max_queue=2)
    if fits:
        admission.check_room(images)
    else:
        with pytest.raises(QueueFull, match="at most 2"):
            admission.check_room(images)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0.1, 50.0), st.booleans(), st.integers(0, 8)),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 4),
)
def test_called_off_images_leave_no_place_taken(plan: list[tuple[str, float, bool, int]], capacity: int) -> None:
    async def main() -> None:
        desk = Desk(capacity)
        tasks = []
        for client, cost, called_off, delay in plan:
            task = asyncio.create_task(desk.image(client, cost))
            tasks.append(task)
            for _ in range(delay):
                await asyncio.sleep(0)
            if called_off:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert desk.admission.drawing == desk.admission.waiting == 0
        assert desk.admission.outstanding_cost == 0
        assert desk.most <= capacity
        kept = sum(not called_off for _, _, called_off, _ in plan)
        assert len(desk.order) >= kept

    run(main())


@pytest.mark.parametrize(("capacity", "max_queue"), [(0, 1), (1, -1)], ids=["no-capacity", "negative-queue"])
def test_wrong_limits_are_refused(capacity: int, max_queue: int) -> None:
    with pytest.raises(ValueError, match="accepted: at least"):
        Admission(capacity, max_queue)
