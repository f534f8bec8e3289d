"""What an evaluation says beyond the curve: calibration, who draws what, and kinds of prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_routers import planted_table

from catimage_accel.routing import (
    ConstantRouter,
    KNNRouter,
    OracleRouter,
    ScoreTable,
    evaluate,
    judge,
    prompt_kinds,
    read_csv,
)

TABLE = planted_table()
RATINGS = read_csv(Path(__file__).parent / "data" / "genai_bench_200.csv").complete()


def test_calibration_finds_a_line_that_was_drawn() -> None:
    predicted = (TABLE.scores - 0.2) / 0.5
    found = judge(predicted, TABLE, resamples=20).calibration
    assert found.slope.value == pytest.approx(0.5)
    assert found.intercept.value == pytest.approx(0.2)
    assert found.gap_slope.value == pytest.approx(0.5)
    assert found.expected_error.value == pytest.approx(np.abs(predicted - TABLE.scores).mean(), rel=0.01)
    assert found.slope.low == pytest.approx(0.5)


def test_calibration_by_brute_force() -> None:
    predicted = KNNRouter(k=5, shrinkage=0.0).fit(TABLE.select(range(120))).predict(TABLE.prompts)
    found = judge(predicted, TABLE, resamples=50).calibration
    x, y = predicted.ravel(), TABLE.scores.ravel()
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.slope.value, found.intercept.value) == (pytest.approx(slope), pytest.approx(intercept))
    gap_x, gap_y = ((part - part.mean(axis=1, keepdims=True)).ravel() for part in (predicted, TABLE.scores))
    assert found.gap_slope.value == pytest.approx(np.polyfit(gap_x, gap_y, 1)[0])
    assert sum(each.pairs for each in found.deciles) == x.size
    error = sum(each.pairs * abs(each.predicted - each.score) for each in found.deciles) / x.size
    assert found.expected_error.value == pytest.approx(error)
    assert len(found.deciles) == 10
    assert all(0.05 * x.size < each.pairs < 0.2 * x.size for each in found.deciles)
    assert found.slope.low < slope < found.slope.high  # type: ignore[operator]


def test_true_scores_are_calibrated_and_equal_predictions_have_no_slope() -> None:
    true = judge(RATINGS.scores, RATINGS, resamples=5).calibration
    assert true.slope.value == pytest.approx(1)
    assert true.expected_error.value == pytest.approx(0)
    same = judge(np.full_like(RATINGS.scores, 3.1), RATINGS, resamples=5).calibration
    assert same.slope.value is same.intercept.value is same.gap_slope.value is None
    assert same.expected_error.value == pytest.approx(abs(3.1 - RATINGS.scores.mean()))


def test_selection_spends_its_share_and_sends_more_to_who_needs_it() -> None:
    found = evaluate(KNNRouter, TABLE, resamples=2)
    for share, selection in found.selection.items():
        assert selection.all.prompts == len(TABLE)
        assert selection.all.cost <= float(share) * TABLE.costs.max() * (1 + 1e-9)
        assert sum(selection.all.rates.values()) == pytest.approx(1)
        by_rate = sum(rate * cost for rate, cost in zip(selection.all.rates.values(), TABLE.costs, strict=True))
        assert selection.all.cost == pytest.approx(by_rate)
    tradeoffs = [selection.tradeoff for selection in found.selection.values()]
    assert tradeoffs == sorted(tradeoffs, reverse=True)
    half = found.selection["0.50"]
    assert half.all.quality == pytest.approx(found.quality_at["0.50"].value, abs=2e-3)
    rates = [half.kinds[kind].rates["50 steps"] for kind in ("one thing", "two things", "four or more things")]
    assert rates == sorted(rates), "the more is asked for, the more the dear candidate gains"
    assert rates[-1] > rates[0] + 0.3
    amounts = [half.kinds[kind].prompts for kind in half.kinds if "thing" in kind]
    assert sum(amounts) == len(TABLE)


def test_a_share_that_buys_nothing_is_left_out() -> None:
    dear = ScoreTable(TABLE.prompts, TABLE.candidates, TABLE.scores, [40.0, 45, 50])
    assert set(evaluate(ConstantRouter, dear, resamples=2).selection) == {"1.00"}


def test_kinds_are_told_by_words() -> None:
    prompts = ["mountains", "a dog", "a dog and a cat", "three dogs", "9 dogs, no cat", "a dog taller than the house",
               "a dog left of the house", "猫"]  # fmt: skip
    found = {kind: np.flatnonzero(mask).tolist() for kind, mask in prompt_kinds(prompts).items()}
    assert found == {
        "no counted thing": [0, 7], "one thing": [1], "two things": [2, 5, 6], "three things": [3],
        "four or more things": [4], "negation": [4], "comparison": [5], "spatial": [6],
    }  # fmt: skip
    given = {kind: np.flatnonzero(mask).tolist() for kind, mask in prompt_kinds(prompts[:3], ["b", "", "a"]).items()}
    assert given == {"a": [2], "b": [0]}


def test_kinds_follow_their_prompts_whatever_the_row_order() -> None:
    kinds = ["long" if len(prompt) > 60 else "short" for prompt in RATINGS.prompts]
    oracle = OracleRouter().fit(RATINGS)
    found = judge(oracle.predict(RATINGS.prompts), RATINGS, kinds=kinds, resamples=2).selection["0.25"].kinds
    assert {kind: each.prompts for kind, each in found.items()} == {kind: kinds.count(kind) for kind in set(kinds)}
    by_words = judge(RATINGS.scores, RATINGS, resamples=2).selection["1.00"].kinds
    for kind, mask in prompt_kinds(RATINGS.prompts).items():
        assert by_words[kind].quality == pytest.approx(RATINGS.scores[mask].max(axis=1).mean())
