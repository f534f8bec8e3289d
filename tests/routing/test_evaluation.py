"""Held-out evaluation: a real gain is found, none is invented, and the report is plain JSON."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from test_routers import planted_table

from catimage_accel.routing import (
    ConstantRouter,
    CountFeatures,
    JointEmbedder,
    KNNRouter,
    NGramEmbedder,
    OracleRouter,
    RandomMixRouter,
    ScoreTable,
    evaluate,
    judge,
    plot_curves,
    read_csv,
)

TABLE = planted_table()
RATINGS = read_csv(Path(__file__).parent / "data" / "genai_bench_200.csv").complete()


@pytest.mark.parametrize(
    "embedder",
    [NGramEmbedder(), CountFeatures(), JointEmbedder(NGramEmbedder(), CountFeatures())],
    ids=["n-grams", "counts", "both"],
)
def test_knn_beats_the_random_mix_on_prompts_it_has_not_seen(embedder: object) -> None:
    found = evaluate(lambda: KNNRouter(embedder), TABLE, resamples=200)  # type: ignore[arg-type]
    assert found.gain_share.low is not None
    assert found.gain_share.low > 0.05
    assert found.hull_area.value < found.area.value < found.oracle_area.value  # type: ignore[operator]


def test_no_gain_is_found_where_there_is_none() -> None:
    for factory in (ConstantRouter, RandomMixRouter):
        found = evaluate(factory, TABLE, resamples=200)
        assert found.gain_share.value == pytest.approx(0, abs=0.05)
    rng = np.random.default_rng(0)
    noise = ScoreTable(TABLE.prompts, TABLE.candidates, rng.normal(size=TABLE.scores.shape), TABLE.costs)
    found = evaluate(KNNRouter, noise, resamples=200)
    assert found.gain_share.low is not None
    assert found.gain_share.low < 0.02


def test_the_true_scores_reach_the_oracle() -> None:
    found = judge(TABLE.scores, TABLE, resamples=50)
    assert found.gain_share.value == pytest.approx(1)
    assert found.qnc.value is not None
    assert found.qnc.value < 1
    # Cross-validated, every fold keeps to the cost by itself, which leaves the oracle a little less room.
    by_fold = evaluate(lambda: Peeking(TABLE), TABLE, resamples=50)
    assert by_fold.oracle_area == found.oracle_area
    assert 0.98 < (by_fold.gain_share.value or 0) <= 1


class Peeking(OracleRouter):
    """An oracle that is told all scores beforehand, so that it may be cross-validated."""

    def __init__(self, everything: ScoreTable) -> None:
        super().fit(everything)

    def fit(self, table: ScoreTable) -> Peeking:
        return self


def test_published_ratings() -> None:
    found = evaluate(KNNRouter, RATINGS, resamples=100)
    assert found.prompts == 200
    assert found.candidates == RATINGS.candidates
    assert found.best_single_candidate == "DALLE_3"
    assert set(found.quality_at) == set(found.regret_at) == {"0.25", "0.50", "0.75"}
    for share, quality in found.quality_at.items():
        regret = found.regret_at[share].value
        at = float(share) * found.costs[-1]
        assert quality.value + regret == pytest.approx(np.interp(at, found.costs, found.oracle), abs=2e-3)  # type: ignore[operator]
    assert found.regret.value == pytest.approx(found.oracle_area.value - found.area.value)  # type: ignore[operator]
    dearest = found.costs[-1]
    for share, gain in found.gain_at.items():
        cost = float(share) * dearest
        if cost >= found.costs[0]:
            drawn = np.interp(cost, found.costs, found.curve) - np.interp(cost, found.costs, found.hull)
            assert gain.value == pytest.approx(drawn, abs=2e-3)
            assert gain.low <= gain.value <= gain.high  # type: ignore[operator]
    for estimate in (found.area, found.hull_area, found.oracle_area, found.gain_share, found.best_single):
        assert estimate.low <= estimate.value <= estimate.high  # type: ignore[operator]
    read = json.loads(found.to_json())
    assert read["gain_share"]["value"] == found.gain_share.value
    assert len(read["costs"]) == len(read["curve"]) == len(read["hull"]) == len(read["oracle"])


def test_row_order_plays_no_part_and_a_seed_fixes_the_rest() -> None:
    rows = np.random.default_rng(0).permutation(len(RATINGS))
    first, again = (evaluate(KNNRouter, table, resamples=20) for table in (RATINGS, RATINGS.select(rows)))
    for name in ("area", "gain_share", "hull_area"):
        a, b = getattr(first, name), getattr(again, name)
        np.testing.assert_allclose([a.value, a.low, a.high], [b.value, b.low, b.high], rtol=1e-9)
    assert evaluate(KNNRouter, RATINGS, seed=1, resamples=20).area != first.area


def test_a_test_table_is_never_learnt_from() -> None:
    training, test = TABLE.split(0.25)
    apart = evaluate(KNNRouter, training, test=test, resamples=20)
    assert evaluate(KNNRouter, TABLE, test=test, resamples=20) == apart
    turned = test.restrict(test.candidates[::-1])
    by_turned = evaluate(KNNRouter, training, test=turned, resamples=20)
    assert by_turned.candidates == turned.candidates
    assert by_turned.area.value == pytest.approx(apart.area.value)
    spelt_otherwise = tuple(f" {prompt.upper()}" for prompt in test.prompts)
    shouted = ScoreTable(spelt_otherwise, test.candidates, test.scores, test.costs)
    with pytest.raises(ValueError, match="all 60 training prompts"):
        evaluate(KNNRouter, shouted, test=test)
    with pytest.raises(ValueError, match="all 60 training prompts are among the 60 test prompts"):
        evaluate(KNNRouter, test, test=test)
    with pytest.raises(ValueError, match=r"the candidates 4 steps, .*, the other DALLE_3, .* the same"):
        evaluate(KNNRouter, TABLE, test=RATINGS)


def test_a_quality_never_reached_is_null() -> None:
    table = ScoreTable(("a", "b"), ("x", "y"), [[0.0, 1.0], [1.0, 2.0]], [1.0, 2.0])
    found = judge(-table.scores, table, resamples=20)
    assert found.qnc.value is None
    assert json.loads(found.to_json())["qnc"]["value"] is None
    assert {share: each.value for share, each in found.quality_at.items()} == {"0.25": None, "0.50": 0.5, "0.75": 0.5}
    assert found.gain_at["0.25"].value is None
    assert found.gain_at["0.75"].value == -0.5


def test_without_headroom_there_is_no_gain_share() -> None:
    table = ScoreTable(("a", "b"), ("x", "y"), [[0.0, 1.0], [0.0, 1.0]], [1.0, 2.0])
    assert judge(table.scores, table, resamples=20).gain_share.value is None


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        pytest.param(TABLE.restrict(["4 steps"]), {}, "candidates 4 steps all cost 4", id="one candidate"),
        pytest.param(TABLE.select(range(3)), {}, "5 folds of 3 different prompts", id="fewer prompts than folds"),
        pytest.param(TABLE, {"resamples": 0}, "resamples is 0", id="no resamples"),
        pytest.param(TABLE, {"confidence": 95}, "confidence 95", id="confidence in per cent"),
    ],
)
def test_refuses(table: ScoreTable, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(ConstantRouter, table, **options)


def test_curves_are_plotted_with_every_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = {name: judge(TABLE.scores, TABLE, resamples=2) for name in ("k-NN", "another router")}
    for ending in ("png", "pdf", "svg"):
        plot_curves(found, tmp_path / f"curves.{ending}", cost_unit="GFLOP", quality="CLIPScore")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "curves.svg").read_text()
    for name in ("another router", "oracle", "best random mix", "50 steps", "GFLOP", "CLIPScore", "240 held-out"):
        assert f"{name}" in drawn, "names stand beside their curves and points"
    with pytest.raises(ValueError, match=r"curves.jpeg', expected a file that ends in \.png"):
        plot_curves(found, tmp_path / "curves.jpeg")
    with pytest.raises(ValueError, match="no evaluations"):
        plot_curves({}, tmp_path / "none.png")


def test_candidates_that_another_beats_have_a_point_and_no_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = [[0.2, 0.5, 0.4, 0.5, 0.8], [0.4, 0.5, 0.6, 0.7, 0.6]]
    costs = [1.0, 5.0, 5.0, 9.0, 20.0]  # in the mean 0.3, 0.5, 0.5, 0.6, 0.7: nobody is beaten
    names = ("least", "twin", "equal", "middle", "most")
    for worse in ([], [("worse", 0.4, 5.0), ("dearer", 0.5, 8.0)]):
        rows = [row + [score for _, score, _ in worse] for row in scores]
        table = ScoreTable(
            ("a", "b"), (*names, *(name for name, *_ in worse)), rows, [*costs, *(cost for *_, cost in worse)]
        )
        plot_curves({"k-NN": judge(table.scores, table, resamples=2)}, tmp_path / "curves.svg")
        drawn = (tmp_path / "curves.svg").read_text()
        assert {name for name in (*names, "worse", "dearer") if f"<!-- {name} -->" in drawn} == set(names)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install catimage-accel\[plots\]"):
        plot_curves({"k-NN": judge(TABLE.scores, TABLE, resamples=2)}, tmp_path / "curves.png")


def test_a_kind_is_judged_as_if_there_were_no_other_prompts() -> None:
    kinds = ["few" if index % 2 else "many" for index in range(len(RATINGS))]
    rng = np.random.default_rng(0)
    predicted = RATINGS.scores + rng.normal(size=RATINGS.scores.shape)
    together = judge(predicted, RATINGS, kinds=kinds, resamples=20)
    assert set(together.by_kind) == {"few", "many"}
    rows = np.arange(1, len(RATINGS), 2)
    alone = judge(predicted[rows], RATINGS.select(rows), resamples=1)
    for figure in ("area", "hull_area", "oracle_area", "gain_share"):
        assert together.by_kind["few"][figure].value == pytest.approx(getattr(alone, figure).value)
    rare = judge(predicted, RATINGS, kinds=["rare" if index < 29 else "" for index in range(len(RATINGS))], resamples=1)
    assert rare.by_kind == {}
