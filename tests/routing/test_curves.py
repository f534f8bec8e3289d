"""Deferral curves against the policy they sweep, and what must hold of their areas."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catimage_accel.routing import choose, deferral_curve, hull_curve, oracle_curve, quality_neutral_cost

CLOSE = 1e-9


@st.composite
def judged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, scores, costs) with ties; at least two costs differ."""
    shape = draw(st.integers(1, 10)), draw(st.integers(2, 5))
    level = st.one_of(st.integers(-2, 2).map(float), st.floats(-5, 5).map(lambda x: round(x, 6)))
    predicted, scores = (draw(arrays(np.float64, shape, elements=level)) for _ in range(2))
    costs = draw(arrays(np.float64, shape[1], elements=st.integers(0, 20).map(float)))
    costs[0] = 21
    return predicted, scores, costs


@given(judged(), st.floats(0, 10))
def test_every_tradeoffs_routing_lies_on_the_curve(case: tuple, tradeoff: float) -> None:
    predicted, scores, costs = case
    curve = deferral_curve(predicted, scores, costs)
    chosen = choose(predicted, costs, tradeoff)
    cost, quality = costs[chosen].mean(), scores[np.arange(len(scores)), chosen].mean()
    # On the polyline; where the curve rises at one cost the point may be anywhere on that segment.
    start, end = curve.costs[:-1], curve.costs[1:]
    share = np.clip((cost - start) / np.maximum(end - start, 1e-300), 0, 1)
    along = curve.qualities[:-1] + share * np.diff(curve.qualities)
    distance = np.hypot(along - quality, start + share * (end - start) - cost)
    nearest = min([*distance, *np.hypot(curve.qualities - quality, curve.costs - cost)])
    assert nearest < 1e-6


@given(judged())
def test_nothing_lies_above_the_oracle_and_the_hull_never_falls(case: tuple) -> None:
    predicted, scores, costs = case
    low, high = costs.min(), costs.max()
    oracle, hull = oracle_curve(scores, costs), hull_curve(scores.mean(axis=0), costs)
    routed = deferral_curve(predicted, scores, costs)
    assert oracle.area(low, high) >= routed.area(low, high) - CLOSE
    assert oracle.area(low, high) >= hull.area(low, high) - CLOSE
    for cost in np.linspace(low, high, 7):
        assert oracle.quality_at(cost) >= routed.quality_at(cost) - CLOSE
    assert (np.diff(hull.qualities) >= 0).all()
    assert (np.diff(routed.costs) >= 0).all()


@given(judged(), st.integers(0, 2**32 - 1))
def test_the_order_of_prompts_and_of_candidates_plays_no_part(case: tuple, seed: int) -> None:
    predicted, scores, costs = case
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(scores)), rng.permutation(len(costs))
    # Candidates that tie in cost and prediction have no order of their own but their position's.
    columns = columns if len(set(costs)) == len(costs) else np.arange(len(costs))
    shuffled = deferral_curve(predicted[rows][:, columns], scores[rows][:, columns], costs[columns])
    area = deferral_curve(predicted, scores, costs).area(costs.min(), costs.max())
    assert shuffled.area(costs.min(), costs.max()) == pytest.approx(area, abs=CLOSE)


def test_area_by_hand() -> None:
    # Constant predictions: a straight line from (1, 0.2) to (3, 0.6), over [1, 5] level after that.
    means, costs = np.array([0.2, 0.6, 0.1]), np.array([1.0, 3.0, 5.0])
    hull = hull_curve(means, costs)
    np.testing.assert_allclose(hull.quality_at([1, 2, 3, 5]), [0.2, 0.4, 0.6, 0.6])
    assert hull.area(1, 5) == pytest.approx((0.4 * 2 + 0.6 * 2) / 4)
    with pytest.raises(ValueError, match="expected candidates of different cost"):
        hull.area(2, 2)


@given(judged())
def test_area_by_brute_force(case: tuple) -> None:
    """Route at a tradeoff between every two at which a prompt changes over, join the points, add up the trapezia."""
    predicted, scores, costs = case
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (predicted[:, :, None] - predicted[:, None, :]) / ((costs[:, None] - costs[None, :]) / costs.max())
    changes = np.unique(np.round(slopes[np.isfinite(slopes) & (slopes > 0)], 9))
    tradeoffs = [0.0, *((changes[1:] + changes[:-1]) / 2), *(changes[:1] / 2), *(changes[-1:] + 1)]
    points = []
    for tradeoff in sorted(tradeoffs, reverse=True):
        chosen = choose(predicted, costs, tradeoff)
        points.append((costs[chosen].mean(), scores[np.arange(len(scores)), chosen].mean()))
    dearest = costs.max()
    points.append((dearest, points[-1][1]))
    area = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(points))
    expected = area / (dearest - costs.min())
    assert deferral_curve(predicted, scores, costs).area(costs.min(), dearest) == pytest.approx(expected, abs=1e-6)


def test_quality_neutral_cost_by_hand() -> None:
    scores, costs = np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([1.0, 9.0])
    # The oracle draws the first prompt cheaply: the dear one's quality at a cost of (1 + 9) / 2.
    assert quality_neutral_cost(oracle_curve(scores, costs), scores.mean(axis=0), costs) == pytest.approx(5 / 9)
    assert quality_neutral_cost(hull_curve(scores.mean(axis=0), costs), scores.mean(axis=0), costs) == pytest.approx(1)
    backwards = deferral_curve(np.array([[0, 1.0], [1.0, 0]]), scores, costs)
    assert quality_neutral_cost(backwards, scores.mean(axis=0), costs) == np.inf


def test_wrong_arrays_are_named() -> None:
    with pytest.raises(ValueError, match=r"predicted has shape \(2, 2\) and scores \(3, 2\)"):
        deferral_curve(np.zeros((2, 2)), np.zeros((3, 2)), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="not all scores finite"):
        oracle_curve(np.array([[np.nan, 1.0]]), np.array([1.0, 2.0]))
