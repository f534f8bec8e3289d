"""Routers judged on prompts that they have not seen, with bootstrap intervals over prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from catimage_accel.routing.curves import Curve, Sweep, best_single, hull_curve, mean_curve, quality_neutral_cost
from catimage_accel.routing.routers import Router, check_candidates
from catimage_accel.routing.table import ScoreTable

CURVE_POINTS = 101
GAIN_SHARES = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Estimate:
    """A figure on the judged prompts, and its interval: None where it is not defined (or, for a cost, not reached)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """How a router did on held-out prompts. Qualities are in the scores' unit, ``costs`` in the table's.

    ``area`` is the mean quality over cost from the cheapest to the dearest candidate, ``hull_area`` that of the best
    random mix of candidates (chosen with hindsight), ``oracle_area`` that of routing by the true scores, and
    ``gain_share`` is ``(area - hull_area) / (oracle_area - hull_area)``: 0 for a random mix, 1 for the oracle.
    ``qnc`` is the share of the best single candidate's cost at which its quality (``best_single``) is matched, None
    if it never is; ``max_quality`` the highest on the curve; ``quality_at`` the quality at shares of the dearest
    candidate's cost (None: under the cheapest's); ``gain_at`` the quality above the best random mix of equal cost, at
    such shares. ``curve``, ``hull`` and ``oracle`` are the qualities at ``costs``,
    evenly spaced.
    """

    prompts: int
    candidates: tuple[str, ...]
    confidence: float
    area: Estimate
    hull_area: Estimate
    oracle_area: Estimate
    gain_share: Estimate
    qnc: Estimate
    best_single: Estimate
    best_single_candidate: str
    max_quality: Estimate
    quality_at: dict[str, float | None]
    gain_at: dict[str, Estimate]
    costs: tuple[float, ...]
    curve: tuple[float, ...]
    hull: tuple[float, ...]
    oracle: tuple[float, ...]

    def to_json(self) -> str:
        """JSON without NaN or infinities."""
        return json.dumps(asdict(self), allow_nan=False)


def evaluate(
    router_factory: Callable[[], Router],
    table: ScoreTable,
    *,
    folds: int = 5,
    test: ScoreTable | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """Fit on some prompts, judge on others: cross-validated by prompt over ``folds``, or on ``test`` when given.

    ``router_factory`` makes an unfitted router: once per fold. With ``test``, training prompts that it holds too are
    left out, and its costs count. ``seed`` fixes folds and resamples; the order of rows plays no part. Errors as in
    ``ScoreTable.folds`` and ``judge``.
    """
    if test is None:
        predicted, fold = np.empty_like(table.scores), np.empty(len(table), dtype=np.intp)
        for number, (training, held_out) in enumerate(table.fold_rows(folds, seed)):
            router = router_factory().fit(table.select(training))
            predicted[held_out] = router.predict([table.prompts[row] for row in held_out])
            fold[held_out] = number
        return judge(predicted, table, fold=fold, seed=seed, resamples=resamples, confidence=confidence)
    check_candidates(table.candidates, test.candidates)
    judged = set(test.prompts)
    training = np.array([row for row, prompt in enumerate(table.prompts) if prompt not in judged], dtype=np.intp)
    if not len(training):
        raise ValueError(f"all {len(table)} training prompts are among the {len(test)} test prompts, expected others")
    predicted = router_factory().fit(table.select(training)).predict(test.prompts)
    return judge(predicted, test, seed=seed, resamples=resamples, confidence=confidence)


def judge(
    predicted: np.ndarray,
    table: ScoreTable,
    *,
    fold: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """Judge predictions (prompts, candidates) for the table's prompts, however they were made.

    ``fold`` (prompts,) says which router made each row, if there were several. Each one's curve is then drawn on its
    own prompts, and the curves are averaged at equal cost. One tradeoff for all would rank the routers against each
    other: a fold of easy prompts leaves harder ones to learn from, so predictions err against their own fold, and
    even constant ones come out far below the random mix.

    Intervals are percentiles over ``resamples`` draws of the prompts with replacement (the predictions stay as they
    are, the best mix and the best candidate are found anew). ValueError for fewer than two different costs,
    ``resamples`` under 1 or ``confidence`` outside (0, 1).
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples is {resamples} and confidence {confidence}, expected >= 1 and between 0 and 1")
    if table.costs.min() == table.costs.max():
        raise ValueError(
            f"the candidates {', '.join(table.candidates)} all cost {table.costs[0]:g}, "
            f"expected at least two of different cost to draw a curve between"
        )
    # By text, so that the resamples do not depend on the order of the rows.
    order = np.array(sorted(range(len(table)), key=lambda row: table.prompts[row]), dtype=np.intp)
    judged, predicted = table.select(order), np.asarray(predicted, dtype=np.float64)[order]
    judging = _Judging(predicted, judged, np.zeros(len(judged)) if fold is None else np.asarray(fold)[order])
    figures = judging.figures(np.ones(len(judged)))
    rng = np.random.default_rng(seed)
    number = len(judged)
    draws = (rng.integers(number, size=number) for _ in range(resamples))
    drawn = [judging.figures(np.bincount(rows, minlength=number)) for rows in draws]
    estimates = {name: _estimate(value, [draw[name] for draw in drawn], confidence) for name, value in figures.items()}
    gain_at = {f"{share:.2f}": estimates.pop(f"gain_at_{share}") for share in GAIN_SHARES}
    cheapest, dearest = float(judged.costs.min()), float(judged.costs.max())
    costs = np.linspace(cheapest, dearest, CURVE_POINTS)
    curve, oracle, hull = judging.curves(np.ones(len(judged)))
    return Evaluation(
        prompts=len(judged),
        candidates=judged.candidates,
        confidence=confidence,
        best_single_candidate=judged.candidates[best_single(judged.mean_scores, judged.costs)],
        quality_at={
            f"{share:.2f}": float(curve.quality_at(share * dearest)) if share * dearest >= cheapest else None
            for share in (0.25, 0.5, 0.75)
        },
        gain_at=gain_at,
        costs=tuple(costs.tolist()),
        curve=tuple(curve.quality_at(costs).tolist()),
        hull=tuple(hull.quality_at(costs).tolist()),
        oracle=tuple(oracle.quality_at(costs).tolist()),
        **estimates,
    )


class _Judging:
    def __init__(self, predicted: np.ndarray, table: ScoreTable, fold: np.ndarray) -> None:
        self.table = table
        self.parts = [np.flatnonzero(fold == number) for number in np.unique(fold)]
        self.routed = [Sweep(predicted[rows], table.scores[rows], table.costs) for rows in self.parts]
        self.ideal = Sweep(table.scores, table.scores, table.costs)

    def curves(self, weights: np.ndarray) -> tuple[Curve, Curve, Curve]:
        """Router, oracle and hull."""
        drawn = [(sweep, weights[rows]) for sweep, rows in zip(self.routed, self.parts, strict=True)]
        drawn = [(sweep, weight) for sweep, weight in drawn if weight.any()]
        shares = [weight.sum() / weights.sum() for _, weight in drawn]
        routed = mean_curve([sweep.curve(weight) for sweep, weight in drawn], shares)
        return routed, self.ideal.curve(weights), hull_curve(self._means(weights), self.table.costs)

    def figures(self, weights: np.ndarray) -> dict[str, float]:
        means, costs = self._means(weights), self.table.costs
        cheapest, dearest = float(costs.min()), float(costs.max())
        curve, oracle, hull = self.curves(weights)
        area, oracle_area, hull_area = (each.area(cheapest, dearest) for each in (curve, oracle, hull))
        # Where the oracle gains nothing over the mix but rounding, there is nothing to have a share of.
        room = oracle_area - hull_area
        has_room = room > 1e-9 * max(1.0, abs(oracle_area))
        at = np.array(GAIN_SHARES) * dearest
        gains = np.where(at >= cheapest, curve.quality_at(at) - hull.quality_at(at), math.nan)
        return {
            **{f"gain_at_{share}": float(gain) for share, gain in zip(GAIN_SHARES, gains, strict=True)},
            "area": area,
            "hull_area": hull_area,
            "oracle_area": oracle_area,
            "gain_share": (area - hull_area) / room if has_room else math.nan,
            "qnc": quality_neutral_cost(curve, means, costs),
            "best_single": float(means[best_single(means, costs)]),
            "max_quality": float(curve.qualities.max()),
        }

    def _means(self, weights: np.ndarray) -> np.ndarray:
        return weights @ self.table.scores / weights.sum()


def _estimate(value: float, drawn: list[float], confidence: float) -> Estimate:
    outer = (1 - confidence) / 2
    defined = [draw for draw in drawn if not math.isnan(draw)]
    # "higher": an interpolation towards infinity (never matched) would be NaN.
    low, high = np.quantile(defined, [outer, 1 - outer], method="higher") if defined else (math.nan, math.nan)
    return Estimate(*(float(x) if math.isfinite(x) else None for x in (value, low, high)))
