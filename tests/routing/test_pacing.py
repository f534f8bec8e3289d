"""A budget over a stream: held on prompts that were not learnt from, by choices that know nothing of the future."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catimage_accel.routing import BudgetPacer, ConstantRouter, KNNRouter, choose_within_budget, read_csv

RATINGS = read_csv(Path(__file__).parent / "data" / "genai_bench_200.csv").complete()
COSTS = RATINGS.costs


def stream(seed: int, router: type = KNNRouter) -> tuple[np.ndarray, np.ndarray]:
    """(predictions for 100 training prompts, those for the other 100, five times in random order)."""
    training, held_out = RATINGS.split(0.5, seed)
    fitted = router().fit(training)
    rows = np.concatenate([np.random.default_rng(seed + i).permutation(len(held_out)) for i in range(5)])
    return fitted.predict(training.prompts), fitted.predict(held_out.prompts)[rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_mean_cost_of_held_out_prompts_is_within_2_per_cent(share: float, seed: int) -> None:
    budget = share * COSTS.max()
    seen, unseen = stream(seed)
    pacer = BudgetPacer(seen, COSTS, budget)
    chosen = pacer.choose(unseen)
    assert pacer.images == len(unseen) >= 300
    assert pacer.mean_cost == pytest.approx(COSTS[chosen].mean())
    assert pacer.mean_cost == pytest.approx(budget, rel=0.02)
    at_once = choose_within_budget(unseen[:300], COSTS, budget)
    assert 0.98 * budget <= COSTS[at_once].mean() <= budget * (1 + 1e-9)
    # Choices one by one are predicted to draw nearly as well as those made with all prompts in view.
    rows, all_at_once = np.arange(len(unseen)), choose_within_budget(unseen, COSTS, budget)
    lost = unseen[rows, all_at_once].mean() - unseen[rows, chosen].mean()
    assert lost < 0.05 * np.ptp(unseen, axis=1).mean()


def test_equal_predictions_are_mixed_to_the_budget() -> None:
    seen, unseen = stream(0, ConstantRouter)
    pacer = BudgetPacer(seen, COSTS, 600)
    assert len(set(pacer.choose(unseen).tolist())) == 2
    assert pacer.mean_cost == pytest.approx(600, rel=0.01)


def test_a_choice_does_not_depend_on_later_prompts_nor_on_batches() -> None:
    seen, unseen = stream(1)
    whole = BudgetPacer(seen, COSTS, 500).choose(unseen)
    piecewise = BudgetPacer(seen, COSTS, 500)
    parts = [piecewise.choose(unseen[start : start + 7]) for start in range(0, 140, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:140])
    other_future = BudgetPacer(seen, COSTS, 500).choose(np.concatenate([unseen[:140], -unseen[140:]]))
    np.testing.assert_array_equal(other_future[:140], whole[:140])


def test_a_stream_unlike_the_training_prompts_keeps_the_budget_too() -> None:
    seen, unseen = stream(2)
    harder = unseen + np.linspace(0, 1, len(COSTS))[np.argsort(np.argsort(COSTS))]
    for changed in (harder, 3 * unseen, unseen[::-1] * 0.2):
        pacer = BudgetPacer(seen, COSTS, 500)
        pacer.choose(changed)
        assert pacer.mean_cost == pytest.approx(500, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    seen=arrays(np.float64, (5, 3), elements=st.floats(-2, 2)),
    unseen=arrays(np.float64, (80, 3), elements=st.floats(-1e6, 1e6)),
    costs=arrays(np.float64, 3, elements=st.floats(0.1, 100)),
    share=st.floats(0, 1.2),
    horizon=st.floats(1, 30),
)
def test_whatever_comes_the_stated_bound_holds(
    seen: np.ndarray, unseen: np.ndarray, costs: np.ndarray, share: float, horizon: float
) -> None:
    cheapest, dearest = costs.min(), costs.max()
    budget = cheapest + share * (dearest - cheapest)
    pacer = BudgetPacer(seen, costs, budget, horizon=horizon)
    spent = np.cumsum(costs[pacer.choose(unseen)])
    most = np.arange(1, 81) * budget + horizon * (budget - cheapest) + dearest
    assert (spent <= most * (1 + 1e-9)).all()


def test_images_of_one_prompt_are_charged_each_and_a_copy_goes_its_own_way() -> None:
    seen, unseen = stream(0)
    pacer = BudgetPacer(seen, COSTS, 500)
    chosen = pacer.choose(unseen[:10], images=4)
    assert (pacer.images, pacer.spent) == (40, 4 * COSTS[chosen].sum())
    copy = pacer.copy()
    copy.choose(unseen)
    assert pacer.images == 40
    pacer.update(copy)
    assert (pacer.images, pacer.spent, pacer.tradeoff) == (copy.images, copy.spent, copy.tradeoff)


def test_a_long_rest_is_not_made_up_for_all_at_once() -> None:
    seen, unseen = stream(0)
    pacer = BudgetPacer(seen, COSTS, 500)
    content = np.zeros((1000, len(COSTS)))  # no candidate gains: the cheapest draws all
    pacer.choose(content)
    before = pacer.spent
    pacer.choose(unseen[:200])
    assert pacer.spent - before <= 200 * 500 + 21 * 1500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"budget": 3.9}, "budget is 3.9, expected at least .* 4", id="under the cheapest"),
        pytest.param({"budget": math.nan}, "budget is nan", id="NaN budget"),
        pytest.param({"horizon": 0}, "horizon is 0, expected at least 1", id="no horizon"),
        pytest.param({"quality": np.zeros((0, 6))}, "0 prompts", id="nothing to expect costs from"),
        pytest.param({"quality": np.zeros((2, 3))}, r"shape \(2, 3\)", id="other candidates"),
    ],
)
def test_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BudgetPacer(**{"quality": np.zeros((2, 6)), "costs": COSTS, "budget": 500, **change})
    with pytest.raises(ValueError, match="images is 0"):
        BudgetPacer(np.zeros((2, 6)), COSTS, 500).choose(np.zeros((1, 6)), images=0)
