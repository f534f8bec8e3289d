"""Deferral curves: mean quality against mean cost as the tradeoff sweeps, and what is read off them.

A curve starts at the cheapest candidate (an infinite tradeoff) and ends where the tradeoff is 0. Between points it is
linear (a random mix of the two routings), beyond its end it stays level (the rest of the budget is not spent). Curves,
their area and the quality-neutral cost follow UniRoute (arXiv 2502.08773).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catimage_accel.routing.policy import choose
from catimage_accel.routing.table import check_costs


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a deferral curve: ``costs`` (points,) never falling, and the ``qualities`` (points,) reached there."""

    costs: np.ndarray
    qualities: np.ndarray

    def quality_at(self, cost: float | np.ndarray) -> np.ndarray:
        """Mean quality at this mean cost, in the scores' unit."""
        return np.interp(cost, self.costs, self.qualities)

    def area(self, cheapest: float, dearest: float) -> float:
        """Mean quality over all costs from ``cheapest`` to ``dearest``, in the scores' unit."""
        if not cheapest < dearest:
            raise ValueError(f"an area from cost {cheapest} to {dearest}, expected candidates of different cost")
        inside = self.costs[(self.costs > cheapest) & (self.costs < dearest)]
        grid = np.concatenate([[cheapest], inside, [dearest]])
        return float(np.trapezoid(self.quality_at(grid), grid) / (dearest - cheapest))

    def cost_of(self, quality: float) -> float:
        """The lowest mean cost at which ``quality`` is reached (to rounding); infinity when it never is."""
        reached = self.qualities >= quality - 1e-9 * max(1.0, abs(quality))
        if not reached.any():
            return float("inf")
        point = int(np.argmax(reached))
        if point == 0:
            return float(self.costs[0])
        rise = self.qualities[point] - self.qualities[point - 1]
        share = min(max((quality - self.qualities[point - 1]) / rise, 0.0), 1.0)
        return float(self.costs[point - 1] + share * (self.costs[point] - self.costs[point - 1]))


class Sweep:
    """All routings of some prompts as the tradeoff falls from infinity to 0; ``curve`` weighs the prompts.

    ``predicted`` and ``scores`` are (prompts, candidates): routes follow the first, qualities the second. A prompt
    moves along the upper hull of its predicted (cost, quality) points, so all its moves are known at once. Moves at
    the same tradeoff are one step of the curve.
    """

    def __init__(self, predicted: np.ndarray, scores: np.ndarray, costs: np.ndarray) -> None:
        costs = check_costs(costs)
        predicted, scores = np.asarray(predicted, dtype=np.float64), np.asarray(scores, dtype=np.float64)
        if predicted.shape != scores.shape or predicted.ndim != 2 or predicted.shape[1] != len(costs):
            raise ValueError(
                f"predicted has shape {predicted.shape} and scores {scores.shape}, "
                f"expected both (prompts, {len(costs)}) for {len(costs)} costs"
            )
        if not len(scores) or not (np.isfinite(predicted).all() and np.isfinite(scores).all()):
            raise ValueError(f"{len(scores)} prompts, not all scores finite; expected finite scores of some prompts")
        prompts = np.arange(len(scores))
        last = choose(predicted, costs, 0.0)
        now = _cheapest(predicted, costs)
        self._first = costs[now], scores[prompts, now]
        moves: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        moving = prompts[now != last]
        while len(moving):
            at = now[moving]
            extra = costs[None, :] - costs[at][:, None]
            gain = predicted[moving] - predicted[moving, at][:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                slope = np.where((extra > 0) & (gain > 0), gain / extra, -np.inf)
            steepest = slope.max(axis=1)
            # Of candidates on one line the dearest: the move passes over those between.
            target = np.argmax(np.where(slope == steepest[:, None], costs[None, :], -1.0), axis=1)
            moves.append((moving, steepest, costs[target] - costs[at], scores[moving, target] - scores[moving, at]))
            now[moving] = target
            moving = moving[(target != last[moving]) & (predicted[moving, target] < predicted[moving, last[moving]])]
        self._prompts, slope, cost, quality = (
            np.concatenate(parts) for parts in (zip(*moves, strict=True) if moves else [[np.zeros(0)]] * 4)
        )
        order = np.argsort(-slope, kind="stable")
        self._prompts, self._cost, self._quality = self._prompts[order].astype(np.intp), cost[order], quality[order]
        slope = slope[order]
        self._ends = np.flatnonzero(np.append(slope[1:] < slope[:-1] * (1 - 1e-12), True)[: len(slope)])

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """The curve with each prompt counted ``weights`` (prompts,) times, once by default."""
        first_cost, first_quality = self._first
        share = np.ones(len(first_cost)) if weights is None else np.asarray(weights, dtype=np.float64)
        share = share / share.sum()
        moved = share[self._prompts]
        costs = np.concatenate([[share @ first_cost], share @ first_cost + np.cumsum(moved * self._cost)[self._ends]])
        qualities = share @ first_quality + np.cumsum(moved * self._quality)[self._ends]
        return Curve(costs, np.concatenate([[share @ first_quality], qualities]))


def mean_curve(curves: Sequence[Curve], shares: Sequence[float]) -> Curve:
    """The mean of several curves at equal cost, each counted with its share (they sum to 1)."""
    costs = np.unique(np.concatenate([curve.costs for curve in curves]))
    return Curve(costs, sum((share * c.quality_at(costs) for c, share in zip(curves, shares, strict=True)), 0 * costs))


def deferral_curve(predicted: np.ndarray, scores: np.ndarray, costs: np.ndarray) -> Curve:
    """The curve of routing by ``predicted``, judged by ``scores``, both (prompts, candidates)."""
    return Sweep(predicted, scores, costs).curve()


def oracle_curve(scores: np.ndarray, costs: np.ndarray) -> Curve:
    """The curve of routing by the true scores: no router's lies above it."""
    return deferral_curve(scores, scores, costs)


def hull_curve(mean_scores: np.ndarray, costs: np.ndarray) -> Curve:
    """The best random mix of candidates at every cost: the upper hull of their (cost, mean score) points.

    ``mean_scores`` is (candidates,), taken from the prompts that are judged: a mix chosen with hindsight.
    """
    means = np.asarray(mean_scores, dtype=np.float64)[None, :]
    return deferral_curve(means, means, costs)


def best_single(mean_scores: np.ndarray, costs: np.ndarray) -> int:
    """The position of the candidate with the best mean score, of equals the cheapest."""
    return int(choose(np.asarray(mean_scores, dtype=np.float64)[None, :], costs, 0.0)[0])


def quality_neutral_cost(curve: Curve, mean_scores: np.ndarray, costs: np.ndarray) -> float:
    """The share of the best single candidate's cost at which the curve reaches its quality; infinity if never.

    1 for the best random mix; under 1, routing draws as well for less.
    """
    best = best_single(mean_scores, costs)
    cost = check_costs(costs)[best]
    reached = curve.cost_of(float(np.asarray(mean_scores)[best]))
    if cost == 0:
        return 1.0 if reached == 0 else float("inf")
    return float(reached / cost)


def _cheapest(predicted: np.ndarray, costs: np.ndarray) -> np.ndarray:
    cheapest = np.flatnonzero(costs == costs.min())
    return cheapest[np.argmax(predicted[:, cheapest], axis=1)]
