"""Routers judged on prompts that they have not seen, with bootstrap intervals over prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from catimage_accel.routing.calibration import Calibration, CalibrationSums
from catimage_accel.routing.curves import Curve, Sweep, best_single, hull_curve, mean_curve, quality_neutral_cost
from catimage_accel.routing.estimates import Estimate, estimate
from catimage_accel.routing.held_out import predict_held_out
from catimage_accel.routing.kinds import prompt_kinds
from catimage_accel.routing.ratings import Ratings
from catimage_accel.routing.routers import Router
from catimage_accel.routing.selection import Selection, selections
from catimage_accel.routing.table import ScoreTable

CURVE_POINTS = 101
SHARES = (0.25, 0.5, 0.75)
GAIN_SHARES = (0.05, 0.1, 0.15, *SHARES)
KIND_FIGURES = ("area", "hull_area", "oracle_area", "gain_share", "qnc", "best_single", "gain_at 0.10", "gain_at 0.25")
KIND_PROMPTS = 30  # of a kind with fewer little can be told
KIND_RESAMPLES = 200  # each takes as long as one of all prompts


@dataclass(frozen=True)
class Evaluation:
    """How a router did on held-out prompts. Qualities are in the scores' unit, ``costs`` in the table's.

    ``left_out`` counts the prompts that were not judged since they lack a candidate. ``area`` is the mean quality over
    cost from the cheapest to the dearest candidate, linear between points; ``hull_area`` that of the best
    random mix of candidates (chosen with hindsight), ``oracle_area`` that of routing by the true scores, and
    ``gain_share`` is ``(area - hull_area) / (oracle_area - hull_area)``: 0 for a random mix, 1 for the oracle.
    ``qnc`` is the share of the best single candidate's cost at which its quality (``best_single``) is matched, None
    if it never is; ``max_quality`` the highest on the curve; ``regret`` is ``oracle_area - area``. At shares of the
    dearest candidate's cost (None: under the cheapest's), ``quality_at`` is the quality, ``regret_at`` what the oracle
    draws better, ``gain_at`` what the best random mix draws worse. ``curve``, ``hull`` and ``oracle`` are the qualities
    at ``costs``, evenly spaced; ``candidate_costs`` and ``candidate_scores`` each candidate's cost and mean score.
    ``by_kind`` has some of the figures of each kind of prompt by itself, as if there were no others, from kinds of 30
    prompts up and by 200 resamples at most.
    """

    prompts: int
    left_out: int
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
    regret: Estimate
    quality_at: dict[str, Estimate]
    regret_at: dict[str, Estimate]
    gain_at: dict[str, Estimate]
    calibration: Calibration
    selection: dict[str, Selection]
    by_kind: dict[str, dict[str, Estimate]]
    candidate_costs: tuple[float, ...]
    candidate_scores: tuple[float, ...]
    costs: tuple[float, ...]
    curve: tuple[float, ...]
    hull: tuple[float, ...]
    oracle: tuple[float, ...]

    def to_json(self) -> str:
        """JSON without NaN or infinities."""
        return json.dumps(asdict(self), allow_nan=False)


def evaluate(
    router_factory: Callable[[], Router],
    table: ScoreTable | Ratings,
    *,
    folds: int = 5,
    test: ScoreTable | Ratings | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """Fit on some prompts, judge on others: cross-validated by prompt over ``folds``, or on ``test`` when given.

    ``router_factory`` makes an unfitted router: once per fold. With ``test``, training prompts that it holds too are
    left out, and its costs and its order of candidates count. Prompts that lack a candidate are learnt from (what is
    missing imputed), never judged. ``seed`` fixes folds and resamples; the order of rows plays no part. Errors as in
    ``predict_held_out`` and ``judge``.
    """
    made = predict_held_out(router_factory, table, folds=folds, test=test, seed=seed)
    return judge(
        made.predicted, made.table, fold=made.fold, kinds=made.kinds, left_out=made.left_out, seed=seed,
        resamples=resamples, confidence=confidence,
    )  # fmt: skip


def judge(
    predicted: np.ndarray,
    table: ScoreTable,
    *,
    fold: np.ndarray | None = None,
    kinds: Sequence[str] | None = None,
    left_out: int = 0,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """Judge predictions (prompts, candidates) for the table's prompts, however they were made.

    ``fold`` (prompts,) says which router made each row, if there were several. Each one's curve is then drawn on its
    own prompts, and the curves are averaged at equal cost. One tradeoff for all would rank the routers against each
    other: a fold of easy prompts leaves harder ones to learn from, so predictions err against their own fold, and
    even constant ones come out far below the random mix. ``kinds`` is as in ``prompt_kinds``, ``left_out`` is passed
    on.

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
    whole = np.ones(len(judged))
    figures = judging.figures(whole)
    rng = np.random.default_rng(seed)
    number = len(judged)
    draws = [np.bincount(rng.integers(number, size=number), minlength=number) for _ in range(resamples)]
    drawn = [judging.figures(weights) for weights in draws]
    estimates = {name: estimate(value, [draw[name] for draw in drawn], confidence) for name, value in figures.items()}

    def taken(prefix: str) -> dict[str, Estimate]:
        names = [name for name in estimates if name.startswith(prefix)]
        return {name.removeprefix(prefix): estimates.pop(name) for name in names}

    costs = np.linspace(float(judged.costs.min()), float(judged.costs.max()), CURVE_POINTS)
    curve, oracle, hull = judging.curves(whole)
    masks = prompt_kinds(judged.prompts, None if kinds is None else [kinds[row] for row in order])
    return Evaluation(
        prompts=len(judged),
        left_out=left_out,
        candidates=judged.candidates,
        confidence=confidence,
        best_single_candidate=judged.candidates[best_single(judged.mean_scores, judged.costs)],
        quality_at=taken("quality_at "),
        regret_at=taken("regret_at "),
        gain_at=taken("gain_at "),
        calibration=judging.calibration.calibration(taken("calibration ")),
        selection=selections(predicted, judged, judging.parts, masks),
        by_kind={
            kind: _of_kind(judging, mask, draws[:KIND_RESAMPLES], confidence)
            for kind, mask in masks.items()
            if mask.sum() >= KIND_PROMPTS
        },
        candidate_costs=tuple(judged.costs.tolist()),
        candidate_scores=tuple(judged.mean_scores.tolist()),
        costs=tuple(costs.tolist()),
        curve=tuple(curve.quality_at(costs).tolist()),
        hull=tuple(hull.quality_at(costs).tolist()),
        oracle=tuple(oracle.quality_at(costs).tolist()),
        **estimates,
    )


def _of_kind(
    judging: _Judging, mask: np.ndarray, draws: Sequence[np.ndarray], confidence: float
) -> dict[str, Estimate]:
    value, drawn = judging.figures(mask.astype(float)), [judging.figures(weights * mask) for weights in draws]
    return {name: estimate(value[name], [draw[name] for draw in drawn], confidence) for name in KIND_FIGURES}


class _Judging:
    def __init__(self, predicted: np.ndarray, table: ScoreTable, fold: np.ndarray) -> None:
        self.table = table
        self.parts = [np.flatnonzero(fold == number) for number in np.unique(fold)]
        self.routed = [Sweep(predicted[rows], table.scores[rows], table.costs) for rows in self.parts]
        self.ideal = Sweep(table.scores, table.scores, table.costs)
        self.calibration = CalibrationSums(predicted, table.scores)

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
        reached = np.where(at >= cheapest, curve.quality_at(at), math.nan)
        at_shares = {f"{share:.2f}": position for position, share in enumerate(GAIN_SHARES)}
        gains, regrets = reached - hull.quality_at(at), oracle.quality_at(at) - reached
        of_curve = {f"{share:.2f}" for share in SHARES}
        return {
            **{f"gain_at {share}": float(gains[i]) for share, i in at_shares.items()},
            **{f"quality_at {share}": float(reached[i]) for share, i in at_shares.items() if share in of_curve},
            **{f"regret_at {share}": float(regrets[i]) for share, i in at_shares.items() if share in of_curve},
            **{f"calibration {name}": value for name, value in self.calibration.figures(weights).items()},
            "area": area,
            "hull_area": hull_area,
            "oracle_area": oracle_area,
            "gain_share": (area - hull_area) / room if has_room else math.nan,
            "regret": oracle_area - area,
            "qnc": quality_neutral_cost(curve, means, costs),
            "best_single": float(means[best_single(means, costs)]),
            "max_quality": float(curve.qualities.max()),
        }

    def _means(self, weights: np.ndarray) -> np.ndarray:
        return weights @ self.table.scores / weights.sum()
