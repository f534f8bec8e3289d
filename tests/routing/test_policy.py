"""The tradeoff and the budget, on any predictions and costs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catimage_accel.routing import choose, choose_reaching, choose_within_budget, tradeoff_for_budget

ROUNDING = 1e-9


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(quality, costs), with ties in both."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    level = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, allow_subnormal=False))
    quality = draw(arrays(np.float64, shape, elements=level))
    price = st.one_of(st.integers(1, 4).map(float), st.floats(0.01, 1e4))
    return quality, draw(arrays(np.float64, shape[1], elements=price))


def mean_cost(costs: np.ndarray, chosen: np.ndarray) -> float:
    return float(costs[chosen].mean())


@given(predictions(), st.lists(st.floats(0, 1e3), min_size=2, max_size=6))
def test_mean_cost_never_rises_with_the_tradeoff(table: tuple[np.ndarray, np.ndarray], tradeoffs: list[float]) -> None:
    quality, costs = table
    means = [mean_cost(costs, choose(quality, costs, tradeoff)) for tradeoff in sorted(tradeoffs)]
    assert all(later <= earlier * (1 + ROUNDING) for earlier, later in pairwise(means))


@given(predictions())
def test_without_a_tradeoff_the_best_wins_and_of_equals_the_cheapest(table: tuple[np.ndarray, np.ndarray]) -> None:
    quality, costs = table
    chosen = choose(quality, costs, 0)
    best = quality.max(axis=1)
    rows = np.arange(len(quality))
    np.testing.assert_array_equal(quality[rows, chosen], best)
    np.testing.assert_array_equal(costs[chosen], np.where(quality == best[:, None], costs, np.inf).min(axis=1))


@given(predictions(), st.floats(0, 50), st.randoms(use_true_random=False))
def test_a_prompts_choice_does_not_depend_on_the_others(table: tuple, tradeoff: float, random: object) -> None:
    quality, costs = table
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(quality))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(choose(quality[order], costs, tradeoff), choose(quality, costs, tradeoff)[order])


@settings(max_examples=200)
@given(predictions(), st.floats(0, 1))
def test_the_budget_is_kept_and_used(table: tuple[np.ndarray, np.ndarray], share: float) -> None:
    quality, costs = table
    budget = float(costs.min() + share * (costs.max() - costs.min()))
    tradeoff = tradeoff_for_budget(quality, costs, budget)
    by_tradeoff = choose(quality, costs, tradeoff)
    assert mean_cost(costs, by_tradeoff) <= budget * (1 + ROUNDING)
    if tradeoff > 0:
        dearer = choose(quality, costs, np.nextafter(tradeoff, 0))
        assert mean_cost(costs, dearer) > budget, "a smaller tradeoff would have been affordable"
    filled = choose_within_budget(quality, costs, budget)
    assert mean_cost(costs, filled) <= budget * (1 + ROUNDING)
    rows = np.arange(len(quality))
    assert (quality[rows, filled] >= quality[rows, by_tradeoff]).all(), "the rest of the budget only buys quality"


def test_constant_predictions_are_mixed_at_the_boundary() -> None:
    quality, costs = np.tile([0.2, 0.3], (100, 1)), np.array([1.0, 11.0])
    assert mean_cost(costs, choose(quality, costs, tradeoff_for_budget(quality, costs, 6))) == 1
    chosen = choose_within_budget(quality, costs, 6)
    assert mean_cost(costs, chosen) == 6
    assert not np.array_equal(chosen, np.sort(chosen)), "the mix is drawn by lot, not by position"
    assert not np.array_equal(chosen, choose_within_budget(quality, costs, 6, seed=1))


def test_a_single_prompt_gets_the_best_candidate_that_it_can_pay() -> None:
    # The middle one lies under the line between the others: no tradeoff ever chooses it.
    assert choose_within_budget(np.array([[0.5, 0.51, 0.9]]), np.array([1.0, 2.0, 10.0]), 5).tolist() == [1]


def test_a_budget_is_used_to_a_hair_over_many_prompts() -> None:
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(2000, 5)).cumsum(axis=1) + 0.3
    costs = np.array([1.0, 3, 9, 20, 50])
    for budget in (2, 10, 15):
        assert budget * 0.998 < mean_cost(costs, choose_within_budget(quality, costs, budget)) <= budget


@given(predictions(), st.floats(-110, 110))
def test_the_cheapest_that_reaches_a_quality(table: tuple[np.ndarray, np.ndarray], wanted: float) -> None:
    quality, costs = table
    for row, chosen in zip(quality, choose_reaching(quality, costs, wanted), strict=True):
        reaching = [(costs[i], -row[i]) for i in range(len(costs)) if row[i] >= wanted]
        if reaching:
            assert (costs[chosen], -row[chosen]) == min(reaching)
        else:
            assert (-row[chosen], costs[chosen]) == min(zip(-row, costs, strict=True))


@pytest.mark.parametrize("wanted", [math.nan, math.inf])
def test_a_quality_that_is_no_number_is_named(wanted: float) -> None:
    with pytest.raises(ValueError, match=f"min_quality is {wanted}, expected a finite number"):
        choose_reaching(np.zeros((1, 2)), np.array([1.0, 2.0]), wanted)


@pytest.mark.parametrize("tradeoff", [-0.1, math.nan, math.inf])
def test_a_wrong_tradeoff_is_named(tradeoff: float) -> None:
    with pytest.raises(ValueError, match=f"tradeoff is {tradeoff}, expected a finite number >= 0"):
        choose(np.zeros((1, 2)), np.array([1.0, 2.0]), tradeoff)


@pytest.mark.parametrize("budget", [0.5, -1, math.nan])
def test_a_budget_that_buys_nothing_is_named(budget: float) -> None:
    for solve in (tradeoff_for_budget, choose_within_budget):
        with pytest.raises(ValueError, match=f"budget is {budget}, expected at least the cheapest candidate's cost 1"):
            solve(np.zeros((1, 2)), np.array([1.0, 2.0]), budget)


@pytest.mark.parametrize(
    ("quality", "costs", "said"),
    [
        pytest.param(np.zeros((2, 3)), [1.0, 2.0], r"shape \(2, 3\), expected \(prompts, 2\)", id="too wide"),
        pytest.param(np.array([[np.nan, 0]]), [1.0, 2.0], "quality holds nan", id="NaN prediction"),
        pytest.param(np.zeros((1, 2)), [1.0, np.inf], "costs are", id="infinite cost"),
    ],
)
def test_wrong_arrays_are_named(quality: np.ndarray, costs: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose(quality, np.array(costs), 0.1)


def test_no_prompts() -> None:
    assert choose(np.zeros((0, 2)), np.array([1.0, 2.0]), 0.1).shape == (0,)
    with pytest.raises(ValueError, match="0 prompts"):
        tradeoff_for_budget(np.zeros((0, 2)), np.array([1.0, 2.0]), 2)
