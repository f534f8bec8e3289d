"""How long an image will wait, from what was drawn lately, and the tradeoff that follows from it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from catimage_accel.routing import LoadTradeoff

__all__ = ["LoadGauge", "Pressure"]

GUESS_SECONDS = 5.0
CURVE = 3.0
"""Small tradeoffs, which save the most for the quality that they give up, then fill most of the way."""


class LoadGauge:
    """Measures how much cost is drawn a second while there is work, over the last ``window`` seconds of it.

    ``rate`` is the guess to begin with, in the costs' unit a second; None: nothing is known, no wait is predicted.
    """

    def __init__(
        self, rate: float | None = None, *, window: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._guess = rate
        self._window = window
        self._clock = clock
        self._busy_since: float | None = None
        self._busy = 0.0
        self._drawn: deque[tuple[float, float]] = deque()
        self._images = 0

    def begin(self) -> None:
        """An image is begun."""
        if self._images == 0:
            self._busy_since = self._clock()
        self._images += 1

    def end(self, cost: float) -> None:
        """An image has ended, and this much of its cost was spent."""
        now = self._busy_time()
        self._images -= 1
        if self._images == 0:
            self._busy, self._busy_since = now, None
        self._drawn.append((now, cost))
        while self._drawn and self._drawn[0][0] < now - self._window:
            self._drawn.popleft()

    @property
    def rate(self) -> float | None:
        """Cost a second of busy time."""
        now = self._busy_time()
        span = min(now, self._window)
        drawn = sum(cost for when, cost in self._drawn if when >= now - self._window)
        # Until enough is measured the guess, which may be another machine's, stands for the rest.
        if self._guess is not None and span < GUESS_SECONDS:
            return (drawn + (GUESS_SECONDS - span) * self._guess) / GUESS_SECONDS
        return drawn / span if span > 0 and drawn > 0 else None

    def seconds(self, cost: float) -> float:
        """Predicted seconds for so much work; 0 as long as nothing is known."""
        rate = self.rate
        return cost / rate if rate else 0.0

    def _busy_time(self) -> float:
        return self._busy + (0.0 if self._busy_since is None else self._clock() - self._busy_since)


@dataclass(frozen=True)
class Pressure:
    """Raises tradeoffs as the predicted wait grows from ``low`` to ``high`` seconds."""

    low: float
    high: float

    @classmethod
    def for_target(cls, target: float, dear_seconds: float) -> Pressure:
        """To keep 95 of 100 latencies under ``target`` seconds (> 0), of which the dearest takes ``dear_seconds``."""
        if not target > 0:
            raise ValueError(f"latency target is {target}; accepted: seconds above 0")
        room = max(target - dear_seconds, 0.25 * target)
        return cls(low=0.15 * room, high=0.9 * room)

    def tradeoff(self, asked: float, cheapest: float, wait: float) -> float:
        """The tradeoff for a request that asks for ``asked``: up to ``cheapest``, at which all is drawn by the cheapest
        candidate, and never less than ``asked``."""
        return LoadTradeoff(asked, max(asked, cheapest), self.high, self.low, CURVE).tradeoff(wait)
