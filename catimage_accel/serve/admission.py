"""Who is drawn next: a bounded queue that shares the workers fairly between clients, by the cost of their images."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

__all__ = ["Admission", "QueueFull"]


class QueueFull(RuntimeError):
    """There is no room for more images to wait."""


@dataclass(order=True)
class _Waiting:
    finish: float
    number: int
    cost: float = field(compare=False)
    client: str = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Admission:
    """Lets at most ``capacity`` images in at once, ``max_queue`` more wait.

    The order is that of start-time fair queueing (Goyal, Vin and Cheng, 1996): an image starts, in virtual time, when
    its client's last one is done, or now, and ends its cost later; the earliest end is next. So every client with
    images waiting gets the same share of the work, whatever the number or the cost of its images, and each image has
    its turn: a client that asks for little is served at once beside one that asks for a lot, and dear images are not
    starved by any number of cheap ones, since those behind them have later ends. To be used within one event loop.
    """

    def __init__(self, capacity: int, max_queue: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; accepted: at least 1")
        if max_queue < 0:
            raise ValueError(f"max_queue is {max_queue}; accepted: at least 0")
        self.capacity = capacity
        self.max_queue = max_queue
        self.drawing = 0
        self.drawing_cost = 0.0
        self._queue: list[_Waiting] = []
        self._number = 0
        self._now = 0.0
        self._ends: dict[str, float] = {}

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def outstanding_cost(self) -> float:
        """The cost of all images waiting and being drawn."""
        return self.drawing_cost + sum(one.cost for one in self._queue)

    def check_room(self, images: int) -> None:
        """Raises QueueFull if so many images more can neither be drawn at once nor wait."""
        free = self.capacity - self.drawing if not self._queue else 0
        if images > free + self.max_queue - self.waiting:
            raise QueueFull(f"{self.waiting} images wait already; at most {self.max_queue} may")

    @asynccontextmanager
    async def place(self, client: str, cost: float) -> AsyncIterator[None]:
        """Holds a place among those drawn; waits for it. QueueFull at once if there is no room to wait."""
        self.check_room(1)
        start = max(self._now, self._ends.get(client, 0.0))
        self._ends[client] = start + cost
        if self.drawing < self.capacity and not self._queue:
            self._begin(start, cost)
        else:
            self._number += 1
            entry = _Waiting(
                start + cost, self._number, cost, client, asyncio.get_running_loop().create_future()
            )  # fmt: skip
            heapq.heappush(self._queue, entry)
            try:
                await entry.turn
            except asyncio.CancelledError:
                self._leave_queue(entry)
                raise
        try:
            yield
        finally:
            self._end(cost)

    def _begin(self, start: float, cost: float) -> None:
        self.drawing += 1
        self.drawing_cost += cost
        self._now = max(self._now, start)
        if len(self._ends) > 2 * (self.waiting + self.capacity) + 64:
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}

    def _end(self, cost: float) -> None:
        self.drawing -= 1
        self.drawing_cost = max(0.0, self.drawing_cost - cost) if self.drawing else 0.0
        self._admit()

    def _leave_queue(self, entry: _Waiting) -> None:
        """A waiting image was called off; one that was let in at the same moment gives its place on."""
        if entry in self._queue:
            self._queue.remove(entry)
            heapq.heapify(self._queue)
            # What was not drawn is not charged.
            self._ends[entry.client] = self._ends.get(entry.client, 0.0) - entry.cost
        elif not entry.turn.cancelled():
            self._end(entry.cost)

    def _admit(self) -> None:
        while self._queue and self.drawing < self.capacity:
            entry = heapq.heappop(self._queue)
            if entry.turn.done():  # called off; it leaves by itself
                continue
            self._begin(entry.finish - entry.cost, entry.cost)
            entry.turn.set_result(None)
