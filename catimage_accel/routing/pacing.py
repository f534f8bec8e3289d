"""A budget over a stream: each prompt is routed as it comes, and the mean cost so far keeps to the budget."""

from __future__ import annotations

from typing import Self

import numpy as np

from catimage_accel.routing.policy import check_budget, check_quality, choose

GRID = 256
SHORTEST, GROWTH = 4, 1 / 64  # the horizon: prompts at first, then this share of the images so far
CREDIT = 20  # dearest images that may be made up for after a stretch that had no use for the budget


class BudgetPacer:
    """Chooses candidates for an unbounded stream of prompts so that their mean cost keeps to ``budget``.

    ``quality`` (prompts, candidates) are predictions for some typical prompts, as ``predict`` of the router gives them
    for those that it was fitted on: they tell which tradeoff costs how much. ``costs`` is (candidates,), ``budget``
    the mean cost an image in its unit. What has been spent too much (or too little) is made up for over the prompts to
    come: within a few at first, so that a short stream keeps to the budget too, within ``horizon`` once it is long,
    so that it is routed by nearly one tradeoff. A choice depends on the prompts before it, never on later ones.

    Whatever the predictions, after n images at most ``n * budget + horizon * (budget - cheapest) + dearest`` is spent.
    Less than the budget is spent while the router predicts no gain from more; of that at most ``CREDIT`` dearest
    images are made up for later. ValueError for wrong arrays, a budget that is NaN or under the cheapest candidate's
    cost, or a horizon under 1.
    """

    def __init__(self, quality: np.ndarray, costs: np.ndarray, budget: float, *, horizon: float = 50) -> None:
        quality, self._costs = check_quality(quality, costs)
        check_budget(quality, self._costs, budget)
        if not horizon >= 1:
            raise ValueError(f"horizon is {horizon}, expected at least 1 prompt")
        self.budget, self.horizon = float(budget), float(horizon)
        self.images, self.spent = 0, 0.0
        self._over = 0.0
        self._tradeoffs = _tradeoff_grid(quality, self._costs)
        self._expected = np.array([self._costs[choose(quality, self._costs, t)].mean() for t in self._tradeoffs])

    @property
    def mean_cost(self) -> float:
        """Of the images so far; 0 before the first."""
        return self.spent / self.images if self.images else 0.0

    @property
    def tradeoff(self) -> float:
        """The tradeoff for the next prompt; infinity when only the cheapest candidate is left to choose."""
        horizon = min(max(SHORTEST, self.images * GROWTH), self.horizon)
        wanted = self.budget - self._over / horizon
        if wanted <= self._costs.min():
            return float("inf")
        # The nearest, not one between: where all prompts change over at once, the choices alternate about the budget.
        return float(self._tradeoffs[np.argmin(np.abs(self._expected - wanted))])

    def choose(self, quality: np.ndarray, *, images: int = 1) -> np.ndarray:
        """Positions (n,) of candidates for the next prompts, in order, of which ``images`` each are drawn.

        ``quality`` is (n, candidates). ValueError for another shape, a value that is not finite, or images under 1.
        """
        quality, _ = check_quality(quality, self._costs)
        if images < 1:
            raise ValueError(f"images is {images}, expected at least 1 a prompt")
        return np.array([self._next(row, images) for row in quality], dtype=np.intp)

    def copy(self) -> Self:
        """A pacer that goes on from here by itself."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def update(self, other: BudgetPacer) -> None:
        """Go on from where ``other``, a copy, has come to."""
        self.images, self.spent, self._over = other.images, other.spent, other._over

    def check_costs(self, costs: np.ndarray) -> None:
        """ValueError naming both unless the candidates cost what they did when this was made."""
        if not np.array_equal(costs, self._costs):
            raise ValueError(
                f"budget is a pacer for costs {self._costs.tolist()}, expected {np.asarray(costs).tolist()}"
            )

    def _next(self, row: np.ndarray, images: int) -> int:
        tradeoff = self.tradeoff
        if tradeoff == float("inf"):
            chosen = int(np.lexsort((-row, self._costs))[0])
        else:
            chosen = int(choose(row[None, :], self._costs, tradeoff)[0])
        cost = float(self._costs[chosen])
        self.images += images
        self.spent += images * cost
        most_owed = CREDIT * (float(self._costs.max()) - self.budget)
        self._over = max(self._over + images * (cost - self.budget), -max(most_owed, 0.0))
        return chosen


def _tradeoff_grid(quality: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """0 and tradeoffs at which prompts change candidates, evenly by their number, the last for the cheapest only."""
    extra = (costs[None, :] - costs[:, None]) / costs.max()
    cheaper, dearer = np.nonzero(extra > 0)
    slopes = (quality[:, dearer] - quality[:, cheaper]) / extra[cheaper, dearer]
    rising = slopes[slopes > 0]
    if not len(rising):
        return np.zeros(1)
    return np.unique(np.concatenate([[0.0], np.quantile(rising, np.linspace(0, 1, GRID)), [rising.max() * 1.001]]))
