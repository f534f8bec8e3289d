"""The tradeoff that follows the load, on its own and in a simulated queue."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catimage_accel.routing import KNNRouter, LoadTradeoff, choose, read_csv, tradeoff_for_budget

RATINGS = read_csv(Path(__file__).parent / "data" / "genai_bench_200.csv").complete()


LOADS = st.lists(st.floats(0, 1e6), min_size=2)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 100), st.floats(0.001, 100), st.floats(0.1, 10), LOADS)
def test_it_rises_with_the_load_between_its_bounds(
    quiet: float, more: float, low: float, width: float, curve: float, loads: list[float]
) -> None:
    rule = LoadTradeoff(quiet, quiet + more, high=low + width, low=low, curve=curve)
    found = [rule.tradeoff(load) for load in sorted(loads)]
    assert all(quiet - 1e-12 <= each <= quiet + more + 1e-12 for each in found)
    assert (np.diff(found) >= -1e-12).all()
    assert rule.tradeoff(0) == quiet
    assert rule.tradeoff(math.inf) == quiet + more


def test_a_curve_rises_late() -> None:
    assert LoadTradeoff(0.0, 8.0, high=3.0, low=1.0, curve=3.0).tradeoff(2.0) == pytest.approx(1.0)
    assert LoadTradeoff(0.0, 8.0, high=3.0, low=1.0).tradeoff(2.0) == pytest.approx(4.0)


def latencies(arrivals: np.ndarray, seconds: np.ndarray, quality: np.ndarray, rule: LoadTradeoff) -> np.ndarray:
    """Of one server in order of arrival; every prompt is routed when it arrives, by the work that waits before it."""
    free_at, found = 0.0, []
    for arrival, row in zip(arrivals, quality, strict=True):
        wait = max(free_at - arrival, 0.0)
        chosen = choose(row[None, :], seconds, rule.tradeoff(wait))[0]
        free_at = arrival + wait + seconds[chosen]
        found.append(free_at - arrival)
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
def test_a_queue_keeps_its_latency_target_where_a_fixed_tradeoff_does_not(seed: int) -> None:
    training, others = RATINGS.split(0.5, seed)
    router = KNNRouter().fit(training)
    rng = np.random.default_rng(seed)
    quality = router.predict(others.prompts)[rng.integers(len(others), size=3000)]
    seconds = RATINGS.costs / RATINGS.costs.max()  # the dear candidate takes one second an image, the cheap 3 ms
    target, quiet = 5.0, 0.1
    busy = tradeoff_for_budget(router.predict(training.prompts), seconds, seconds.min())
    # For the middle third 3 images a second come: above what the dear one draws, below the cheap one's 375.
    rate = np.repeat([0.5, 3.0, 0.5], 1000)
    arrivals = np.cumsum(rng.exponential(1 / rate))
    fixed = latencies(arrivals, seconds, quality, LoadTradeoff(quiet, quiet, high=1))
    loaded = latencies(arrivals, seconds, quality, LoadTradeoff(quiet, busy, high=target - 1))
    assert np.quantile(fixed[1000:2000], 0.95) > 10 * target
    assert np.quantile(loaded[1000:2000], 0.95) < target
    assert np.quantile(loaded, 0.95) < target
    # When the queue has emptied, prompts are drawn as before it.
    assert loaded[2200:].mean() == pytest.approx(loaded[:1000].mean(), rel=0.35)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"busy": 0.05}, "quiet is 0.1 and busy 0.05", id="cheaper when idle"),
        pytest.param({"quiet": -1}, "quiet is -1", id="negative tradeoff"),
        pytest.param({"busy": math.inf}, "busy inf", id="unbounded"),
        pytest.param({"high": 0}, "low is 0.0 and high 0", id="no room to rise in"),
        pytest.param({"high": math.nan}, "high nan", id="NaN load"),
        pytest.param({"curve": 0}, "curve is 0", id="flat curve"),
    ],
)
def test_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoadTradeoff(**{"quiet": 0.1, "busy": 1.0, "high": 4.0, **change})
    for load in (-1, math.nan):
        with pytest.raises(ValueError, match=f"load is {load}"):
            LoadTradeoff(0.1, 1.0, high=4.0).tradeoff(load)
