"""A tradeoff that follows the load: the longer the queue, the cheaper the candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadTradeoff:
    """The tradeoff to route the next prompt with, from how long it would wait.

    ``tradeoff(load)`` is ``quiet`` up to a load of ``low``, ``busy`` from ``high`` on, and between them rises with the
    share of the way to the power of ``curve``: never outside of the two, never falling as the load rises, and without
    memory, so that it is ``quiet`` again as soon as the queue is. ``load``, ``low`` and ``high`` are in one unit:
    seconds of predicted wait, or images queued. A first small tradeoff saves far more than the next one as small, so a
    ``curve`` above 1, which spreads the small ones over most of the way, gives up less quality under moderate load.

    It keeps a latency target while images come faster than the dear candidates are drawn, but slower than those that
    ``busy`` chooses, if ``high`` is at most the target less the time that one dear image takes. A safe ``busy`` is
    ``tradeoff_for_budget`` of typical predictions with the cheapest candidate's cost as the budget.
    ValueError unless ``0 <= quiet <= busy``, ``0 <= low < high`` and ``0 < curve``, all finite.
    """

    quiet: float
    busy: float
    high: float
    low: float = 0.0
    curve: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.quiet <= self.busy and math.isfinite(self.busy)):
            raise ValueError(f"quiet is {self.quiet} and busy {self.busy}, expected 0 <= quiet <= busy, both finite")
        if not (0 <= self.low < self.high and math.isfinite(self.high)):
            raise ValueError(f"low is {self.low} and high {self.high}, expected 0 <= low < high, both finite")
        if not (self.curve > 0 and math.isfinite(self.curve)):
            raise ValueError(f"curve is {self.curve}, expected a finite number above 0")

    def tradeoff(self, load: float) -> float:
        """For this load (>= 0; infinity is allowed); ValueError for another."""
        if not load >= 0:
            raise ValueError(f"load is {load}, expected a number >= 0")
        share = min(max((load - self.low) / (self.high - self.low), 0.0), 1.0) ** self.curve
        return self.quiet * (1 - share) + self.busy * share
