"""Whether predicted qualities mean what they say: reliability, and the line of score on prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from catimage_accel.routing.estimates import Estimate

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """The pairs of one decile of the predictions: how many, their mean prediction and their mean score."""

    pairs: int
    predicted: float
    score: float


@dataclass(frozen=True)
class Calibration:
    """Predictions against scores, over all pairs of a judged prompt and a candidate.

    ``slope`` and ``intercept`` are the least-squares line of score on prediction (1 and 0 when calibrated; a slope
    under 1 means predictions that differ too much), ``gap_slope`` the slope within prompts, between their
    candidates: what routes follow. ``expected_error`` is the mean over ``deciles`` of the absolute difference of mean
    prediction and mean score, by pairs, in the scores' unit: the expected calibration error of Naeini et al.,
    "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015), with equally filled bins. Resampling
    adds to its noise, so its interval lies high. A slope is None where all predictions are the same.
    """

    slope: Estimate
    intercept: Estimate
    gap_slope: Estimate
    expected_error: Estimate
    deciles: tuple[Reliability, ...]


class CalibrationSums:
    """The sums over each prompt's pairs from which ``Calibration`` follows for any weights of the prompts."""

    def __init__(self, predicted: np.ndarray, scores: np.ndarray) -> None:
        gaps, true_gaps = (part - part.mean(axis=1, keepdims=True) for part in (predicted, scores))
        # About their means, or the squares would cancel.
        self._centre = float(predicted.mean()), float(scores.mean())
        x, y = predicted - self._centre[0], scores - self._centre[1]
        self._moments = np.stack([x, y, x * x, x * y, gaps * gaps, gaps * true_gaps]).sum(axis=2).T
        self._candidates = predicted.shape[1]
        edges = np.unique(np.quantile(predicted, np.arange(1, BINS) / BINS))
        decile = np.searchsorted(edges, predicted, side="left")
        shape = (len(edges) + 1, len(predicted))
        self._count, self._predicted, self._score = np.zeros((3, *shape))
        rows = np.broadcast_to(np.arange(len(predicted))[:, None], predicted.shape)
        np.add.at(self._count, (decile, rows), 1)
        np.add.at(self._predicted, (decile, rows), predicted)
        np.add.at(self._score, (decile, rows), scores)
        self._error = (self._score - self._predicted).T

    def figures(self, weights: np.ndarray) -> dict[str, float]:
        """slope, intercept, gap_slope and expected_error with each prompt counted ``weights`` (prompts,) times."""
        pairs = weights.sum() * self._candidates
        x, y, xx, xy, gap, gap_product = (weights @ self._moments) / pairs
        spread = xx - x * x
        slope = (xy - x * y) / spread if spread > _rounding(self._centre[0]) else math.nan
        return {
            "slope": float(slope),
            "intercept": float(self._centre[1] + y - slope * (self._centre[0] + x)),
            "gap_slope": float(gap_product / gap) if gap > _rounding(self._centre[0]) else math.nan,
            "expected_error": float(np.abs(weights @ self._error).sum() / pairs),
        }

    def calibration(self, estimates: Mapping[str, Estimate]) -> Calibration:
        """The estimates of ``figures`` with the deciles beside them."""
        count, predicted, score = (part.sum(axis=1) for part in (self._count, self._predicted, self._score))
        deciles = tuple(
            Reliability(int(number), float(p / number), float(s / number))
            for number, p, s in zip(count, predicted, score, strict=True)
            if number
        )
        return Calibration(**estimates, deciles=deciles)


def _rounding(level: float) -> float:
    return (1e-9 * max(1.0, abs(level))) ** 2
