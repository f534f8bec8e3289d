"""Score tables: what is read, what is refused, and that row order plays no part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from catimage_accel.routing import ScoreTable, read_csv, read_parquet
from catimage_accel.routing.table import plain_text

RATINGS = Path(__file__).parent / "data" / "genai_bench_200.csv"
HEADER = "prompt_id,prompt,candidate,score,cost\n"


def small_table(**changes: object) -> ScoreTable:
    parts: dict = {
        "prompts": ("a dog", "a cat", "two dogs"),
        "candidates": ("cheap", "dear"),
        "scores": np.array([[0.2, 0.3], [0.3, 0.3], [0.1, 0.4]]),
        "costs": np.array([1.0, 10.0]),
    }
    return ScoreTable(**(parts | changes))


def write_scores(path: Path, rows: list[tuple]) -> Path:
    columns = dict(zip(("prompt", "candidate", "seed", "metric", "score"), zip(*rows, strict=True), strict=True))
    pyarrow.parquet.write_table(pyarrow.table({name: list(column) for name, column in columns.items()}), path)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"prompts": ("a dog", "a dog", "two dogs")}, "'a dog' stands there twice", id="same prompt"),
        pytest.param({"candidates": ("dear", "dear")}, "candidate 'dear' stands there twice", id="same candidate"),
        pytest.param({"prompts": ("a dog", 3, "b")}, "prompt 1 is 3, expected a string", id="prompt not a string"),
        pytest.param({"scores": np.full((3, 2), np.nan)}, "'a dog' with candidate 'cheap' is nan", id="NaN score"),
        pytest.param({"scores": np.zeros((2, 3))}, r"shape \(2, 3\), expected .* \(3, 2\)", id="transposed scores"),
        pytest.param({"costs": [1.0, -2.0]}, r"\[1.0, -2.0\], expected one finite number >= 0", id="negative cost"),
        pytest.param({"costs": [0.0, 0.0]}, "at least one of them positive", id="everything free"),
        pytest.param({"costs": [1.0]}, "1 costs for 2 candidates", id="a cost short"),
        pytest.param({"prompts": (), "scores": np.zeros((0, 2))}, "at least one prompt", id="no prompts"),
    ],
)
def test_refuses(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_table(**changes)


def test_scores_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        small_table().scores[0, 0] = 1


def test_published_ratings_are_read() -> None:
    table = read_csv(RATINGS).whole(RATINGS)
    assert table.scores.shape == (200, 6)
    assert dict(zip(table.candidates, table.costs, strict=True))["SDXL_Turbo"] == 4
    assert 1 <= table.scores.min() < table.scores.max() <= 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("prompt,candidate,score\n", "lacks the columns prompt_id, cost", id="unknown columns"),
        pytest.param("", "found none", id="empty file"),
        pytest.param(HEADER, "no rows", id="header only"),
        pytest.param(HEADER + "1,a,x,0.5,1\n1,a,x,0.6,1\n", "line 3: .* stands here twice", id="twice"),
        pytest.param(HEADER + "1,a,x,nan,1\n", "line 2: the score is 'nan'", id="NaN score"),
        pytest.param(HEADER + "1,a,x,good,1\n", "the score is 'good'", id="score is a word"),
        pytest.param(HEADER + "1,a,x,1,1\n2,b,x,1,2\n", "candidate 'x' costs 2.0, but 1.0 before", id="two costs"),
        pytest.param(HEADER + "1,a,x,1,1\n1,b,y,1,2\n", "'1' has a second text 'b'", id="id with two texts"),
        pytest.param(HEADER + "1,a,x,1,1\n1,a,y,1,2\n2,b,x,1,1\n", "lacks 1 of 4 .* 'b' with .* 'y'", id="missing"),
        pytest.param(HEADER + "1,a,x\n", "line 2: the row ends early", id="file cut off"),
    ],
)
def test_csv_refuses(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_csv(path).whole(path)


def test_csv_joins_ids_with_one_text(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEADER + "1,a,x,0.2,1\n2,a,x,0.4,1\n3,b,x,0.5,1\n", encoding="utf-8")
    table = read_csv(path).whole(path)
    assert table.prompts == ("a", "b")
    np.testing.assert_allclose(table.scores[:, 0], [0.3, 0.5])


def test_parquet_means_over_seeds_of_one_metric(tmp_path: Path) -> None:
    rows = [
        ("a", "x", 0, "clip", 0.2),
        ("a", "x", 1, "clip", 0.4),
        ("a", "y", 0, "clip", 0.5),
        ("a", "x", 0, "fid", 9.0),
    ]
    table = read_parquet(write_scores(tmp_path / "q.parquet", rows), {"y": 2.0, "x": 1.0}, "clip").whole(tmp_path)
    assert table.candidates == ("y", "x")
    np.testing.assert_allclose(table.scores, [[0.5, 0.3]])
    np.testing.assert_array_equal(table.costs, [2, 1])


@pytest.mark.parametrize(
    ("rows", "costs", "metric", "said"),
    [
        pytest.param([("a", "x", 0, "clip", 1.0)], {"x": 1.0}, "fid", "'fid', only of clip", id="unknown metric"),
        pytest.param([("a", "x", 0, "clip", 1.0)], {"z": 1.0}, "clip", "no score of z; score", id="not profiled"),
        pytest.param([("a", "x", 0, "clip", 1.0)] * 2, {"x": 1.0}, "clip", "stands there twice", id="profiled twice"),
        pytest.param([("a", "x", 0, "clip", None), ("b", "x", 0, "clip", 1.0)], {"x": 1.0}, "clip", "nan", id="null"),
    ],
)
def test_parquet_refuses(tmp_path: Path, rows: list, costs: dict, metric: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_parquet(write_scores(tmp_path / "q.parquet", rows), costs, metric).whole(tmp_path)


def test_parquet_rows_of_a_candidate_that_is_gone_are_skipped(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "q.parquet", [("a", "x", 0, "clip", 0.2), ("b", "gone", 0, "clip", 0.4)])
    table = read_parquet(path, {"x": 1.0}, "clip").whole(tmp_path)
    assert (table.prompts, table.candidates, table.scores.tolist()) == (("a",), ("x",), [[0.2]])


def test_parquet_cut_off_by_a_crash(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "q.parquet", [("a", "x", 0, "clip", 1.0)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        read_parquet(path, {"x": 1.0}, "clip").whole(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_parquet(tmp_path / "nowhere", {"x": 1.0}, "clip").whole(tmp_path)


def test_folds_hold_every_prompt_out_once_whatever_the_row_order() -> None:
    table = read_csv(RATINGS).whole(RATINGS)
    folds = table.folds(7)
    held_out = [set(part.prompts) for _, part in folds]
    assert set().union(*held_out) == set(table.prompts)
    assert sum(map(len, held_out)) == len(table)
    assert all(not set(training.prompts) & set(part.prompts) for training, part in folds)
    shuffled = table.select(np.random.default_rng(0).permutation(len(table)))
    assert [set(part.prompts) for _, part in shuffled.folds(7)] == held_out


SPELLINGS = ("a dog", "A dog", " a  dog ", "a cat", "A CAT", "bee", "Bee", "\uff42\uff45\uff45")  # the last is wide


@given(prompts=st.lists(st.sampled_from(SPELLINGS), unique=True), number=st.integers(2, 3))
def test_spellings_of_one_prompt_are_held_out_together(prompts: list[str], number: int) -> None:
    different = len({plain_text(prompt) for prompt in prompts})
    assume(different >= number)
    table = ScoreTable(tuple(prompts), ("x",), np.ones((len(prompts), 1)), np.ones(1))
    folds = table.folds(number)
    for training, held_out in [*folds, table.split(0.5)]:
        assert not {plain_text(one) for one in training.prompts} & {plain_text(one) for one in held_out.prompts}
        assert len(training) + len(held_out) == len(prompts)
    assert sorted(one for _, held_out in folds for one in held_out.prompts) == sorted(prompts)
    with pytest.raises(ValueError, match=f"folds of {different} different prompts"):
        table.folds(different + 1)


def test_split_restrict_and_their_errors() -> None:
    table = small_table()
    training, held_out = table.split(0.01)
    assert (len(training), len(held_out)) == (2, 1)
    assert table.restrict(["dear"]).scores.shape == (3, 1)
    with pytest.raises(ValueError, match="no candidate 'x' in the table, which has cheap, dear"):
        table.restrict(["x"])
    with pytest.raises(ValueError, match="4 folds of 3 different prompts"):
        table.folds(4)
    with pytest.raises(ValueError, match=r"share of 1\.5"):
        table.split(1.5)
