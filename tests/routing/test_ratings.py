"""Tables with holes: learnt from, never judged on, and never filled from what is held out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catimage_accel.routing import ConstantRouter, KNNRouter, Ratings, evaluate, predict_held_out, read_csv

HEADER = "prompt_id,prompt,candidate,score,cost\n"
NAMES, COSTS = ("cheap", "middle", "dear"), [1.0, 3.0, 10.0]
PUBLISHED = read_csv(Path(__file__).parent / "data" / "genai_bench_200.csv").complete()


def ratings(scores: np.ndarray, **more: object) -> Ratings:
    prompts = tuple(f"prompt {row}" for row in range(len(scores)))
    return Ratings(prompts, NAMES[: scores.shape[1]], scores, np.array(COSTS[: scores.shape[1]]), **more)  # type: ignore[arg-type]


@settings(deadline=None)
@given(arrays(np.float64, 8, elements=st.floats(-5, 5)), arrays(np.float64, 3, elements=st.floats(-5, 5)), st.data())
def test_what_is_the_sum_of_two_effects_is_found_again(
    prompt: np.ndarray, candidate: np.ndarray, data: st.DataObject
) -> None:
    true = prompt[:, None] + candidate
    holes = data.draw(arrays(np.bool_, (8, 3)))
    holes[0] = False  # one whole prompt ties the candidates together
    holes[holes.all(axis=1), 0] = False
    partial = ratings(np.where(holes, np.nan, true))
    np.testing.assert_allclose(partial.imputed().scores, true, atol=1e-6)
    assert partial.missing == holes.sum()
    np.testing.assert_array_equal(partial.complete().scores, true[~holes.any(axis=1)])


def test_scores_that_are_there_stay_as_they_are() -> None:
    holed = PUBLISHED.scores.copy()
    holed[::3, 1] = np.nan
    partial = Ratings(PUBLISHED.prompts, PUBLISHED.candidates, holed, PUBLISHED.costs)
    there = ~np.isnan(holed)
    np.testing.assert_array_equal(partial.imputed().scores[there], holed[there])
    np.testing.assert_array_equal(Ratings.of(PUBLISHED).imputed().scores, PUBLISHED.scores)


def test_partial_prompts_are_learnt_from_and_not_judged() -> None:
    rng = np.random.default_rng(0)
    holed = PUBLISHED.scores.copy()
    holed[rng.choice(200, 60, replace=False), rng.integers(0, 6, 60)] = np.nan
    partial = Ratings(PUBLISHED.prompts, PUBLISHED.candidates, holed, PUBLISHED.costs)
    found = evaluate(KNNRouter, partial, resamples=10)
    assert (found.prompts, found.left_out) == (140, 60)
    made = predict_held_out(ConstantRouter, partial)
    assert set(made.table.prompts) == {PUBLISHED.prompts[row] for row in partial.complete_rows}
    # Each fold's means are those of its own training prompts with what they lack filled in from each other.
    for fold in range(5):
        held_out = {made.table.prompts[row] for row in np.flatnonzero(made.fold == fold)}
        training = partial.select([row for row, prompt in enumerate(partial.prompts) if prompt not in held_out])
        expected = training.imputed().mean_scores
        np.testing.assert_allclose(made.predicted[made.fold == fold], np.tile(expected, (len(held_out), 1)))


def test_partial_prompts_are_not_learnt_from_where_another_spelling_is_judged() -> None:
    prompts = ("a dog", "a cat", "A  DOG")
    found = Ratings(prompts, ("cheap", "dear"), np.array([[1, 2], [3, 4], [9, math.nan]]), np.array([1.0, 2.0]))
    made = predict_held_out(ConstantRouter, found, folds=2)
    np.testing.assert_allclose(made.predicted[made.table.prompts.index("a dog")], [3, 4])
    assert made.predicted[made.table.prompts.index("a cat"), 0] == 5  # of 1 and 9


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        pytest.param([[1, 2, math.nan], [math.nan, 2, 1]], "none of the 2 prompts has a score with each of", id="none"),
        pytest.param([[math.nan] * 3, [1, 2, 3]], "'prompt 0' has no score", id="prompt-without-scores"),
        pytest.param([[1, 2, math.inf], [1, 2, 3]], "'prompt 0' with candidate 'dear' is inf", id="infinite"),
    ],
)
def test_refuses(scores: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(ConstantRouter, ratings(np.array(scores)), folds=2)


def test_candidates_that_share_no_prompt_cannot_be_compared() -> None:
    apart = ratings(np.array([[1, 2, math.nan], [2, 1, math.nan], [math.nan, math.nan, 3]]))
    with pytest.raises(ValueError, match="fall into groups that share no prompt among the 3"):
        apart.imputed()


def test_csv_with_kinds_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    rows = ["1,a,x,1,1,easy", "1,a,y,2,5,easy", "2,b,x,1,1,", "3,c,x,2,1,hard", "3,c,y,4,5,hard"]
    path.write_text("prompt_id,prompt,candidate,score,cost,kind\n" + "\n".join(rows))
    found = read_csv(path)
    assert found.kinds == ("easy", "", "hard")
    np.testing.assert_array_equal(found.scores, [[1, 2], [1, np.nan], [2, 4]])
    assert found.complete().prompts == ("a", "c")
    judged = evaluate(ConstantRouter, found, folds=2, resamples=2)
    assert set(judged.selection["1.00"].kinds) == {"easy", "hard"}
    path.write_text("prompt_id,prompt,candidate,score,cost,kind\n1,a,x,1,1,easy\n1,a,y,2,5,hard\n")
    with pytest.raises(ValueError, match="line 3: the prompt 'a' is of kind 'hard', but 'easy' before"):
        read_csv(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(HEADER.encode() + b"1,caf\xe9,x,1,1\n", id="latin-1"),
        pytest.param(HEADER.encode("utf-16"), id="utf-16"),
        pytest.param(HEADER.encode() + b"1," + b"a" * 200_000 + b",x,1,1\n", id="field-over-the-limit"),
    ],
)
def test_what_is_not_csv_in_utf_8_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores.csv, after line \d: not CSV in UTF-8"):
        read_csv(tmp_path / "scores.csv")


def test_any_script_and_ten_thousand_characters(tmp_path: Path) -> None:
    prompts = ["猫と犬", "кошка на столе", "قطة", "🦁🦁", "long " * 2000, "\tzwei Löwen"]
    lines = [f"{i},{prompt},{candidate},{i % 3},{cost}"
             for i, prompt in enumerate(prompts) for candidate, cost in (("x", 1), ("y", 2))]  # fmt: skip
    (tmp_path / "scores.csv").write_text(HEADER + "\n".join(lines), encoding="utf-8")
    found = read_csv(tmp_path / "scores.csv")
    assert list(found.prompts) == prompts
    assert evaluate(KNNRouter, found, folds=3, resamples=5).prompts == 6
