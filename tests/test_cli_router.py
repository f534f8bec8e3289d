"""``catimage router``: figures in a file, tables of every kind, and bad input said in one line with exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from catimage_accel.catalog import Catalog
from catimage_accel.cli import app

HEADER = "prompt_id,prompt,candidate,score,cost"
RATINGS = Path(__file__).parent / "routing" / "data" / "genai_bench_200.csv"
PAIR = (("small", 1, 1), ("large", 2, 5))


def catimage(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluated(*arguments: object) -> Any:
    """``router eval`` with few resamples, which is quicker."""
    return catimage("router", "eval", *arguments, "--resamples", 20)


def write(path: Path, prompts: range = range(30), pairs: tuple = PAIR, *more: str) -> Path:
    """Thirty prompts of three sorts, with a small and a large candidate unless told otherwise."""
    lines = [f"{i},a {'big ' * (i % 3)}dog of {i},{name},{score + i % 3},{cost}"
             for i in prompts for name, score, cost in pairs]  # fmt: skip
    path.write_text("\n".join([HEADER, *lines, *more]) + "\n", encoding="utf-8")
    return path


def figures(*arguments: object) -> dict[str, Any]:
    done = evaluated(*arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_json_file_holds_every_figure_of_every_router(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.json"
    done = evaluated("--table", RATINGS, "--json", out)
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.parent.iterdir()] == ["figures.json"]
    found = json.loads(out.read_text())
    assert set(found) == {"kernel", "k-NN", "constant", "random mix", "oracle"}
    for name, each in found.items():
        for figure in ("area", "hull_area", "oracle_area", "gain_share", "best_single", "max_quality", "regret"):
            assert set(each[figure]) == {"value", "low", "high"}, (name, figure)
            assert each[figure]["low"] - 1e-9 <= each[figure]["value"] <= each[figure]["high"] + 1e-9, (name, figure)
        room = each["oracle_area"]["value"] - each["hull_area"]["value"]
        gain = each["area"]["value"] - each["hull_area"]["value"]
        assert each["gain_share"]["value"] == pytest.approx(gain / room)
        assert set(each["quality_at"]) == set(each["regret_at"]) == {"0.25", "0.50", "0.75"}
        assert set(each["selection"]["0.50"]["all"]["rates"]) == set(each["candidates"])
        assert "one thing" in each["selection"]["0.50"]["kinds"]
    assert found["oracle"]["gain_share"]["value"] == pytest.approx(1)
    assert found["oracle"]["regret"]["value"] == pytest.approx(0)
    assert found["constant"]["gain_share"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["k-NN"]["calibration"]["expected_error"]["value"] > 0


@pytest.mark.parametrize("features", ["auto", "ngrams", "text-encoder"])
@pytest.mark.parametrize("router", ["kernel", "k-NN", "transformer"])
def test_every_router_is_fitted_and_read_back(router: str, features: str, tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    done = catimage("router", "fit", folder, "--router", router, "--features", features)
    assert done.exit_code == 0, done.output
    assert f"{router} router for 3 candidates saved" in done.stderr
    found = Catalog.load(folder).router().predict(["a dog and two cats"])
    assert found.shape == (1, 3)


def test_only_the_routers_that_are_named_are_judged(tmp_path: Path) -> None:
    found = figures("--table", write(tmp_path / "table.csv"), "--router", "transformer", "--features", "ngrams")
    assert set(found) == {"transformer", "constant", "random mix", "oracle"}


def test_the_tables_fit_a_hundred_columns() -> None:
    text, _, legend = evaluated("--table", RATINGS).stdout.partition("at 25%: ")
    assert max(map(len, text.splitlines())) <= 100
    assert "regret" in legend, "what follows is plain text that wraps"
    for word in ("k-NN", "best random mix", "oracle", "always DALLE_3", "gain share", "quality-neutral cost", "at 50%"):
        assert word in text
    assert "…" not in text


def test_train_is_learnt_from_and_table_judged(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", range(10))
    turned = write(tmp_path / "train.csv", range(10, 40), PAIR[::-1])
    done = evaluated("--table", table, "--train", turned, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert "train.csv" not in done.stderr, "nothing was dropped, so nothing is said"
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["k-NN"]["prompts"] == 10
    assert found["k-NN"]["candidates"] == ["small", "large"]


def test_prompts_in_both_files_are_dropped_from_training(tmp_path: Path) -> None:
    table, train = write(tmp_path / "table.csv", range(10)), write(tmp_path / "train.csv", range(5, 40))
    alone = write(tmp_path / "alone.csv", range(10, 40))
    done = evaluated("--table", table, "--train", train)
    assert done.exit_code == 0
    assert "5 of 35 prompts also stand in --table; judged on, not learnt from" in done.stderr
    assert figures("--table", table, "--train", train) == figures("--table", table, "--train", alone)


def test_the_tables_costs_count(tmp_path: Path) -> None:
    table, train = write(tmp_path / "table.csv", range(10)), write(tmp_path / "train.csv", range(10, 40))
    dearer = write(tmp_path / "dearer.csv", range(10, 40), (("small", 1, 3), ("large", 2, 50)))
    done = evaluated("--table", table, "--train", dearer)
    assert "dearer.csv: costs differ from those of --table, which count" in done.stderr
    assert figures("--table", table, "--train", dearer) == figures("--table", table, "--train", train)


def test_prompts_that_lack_a_candidate_are_said_and_not_judged(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", range(30), PAIR, "97,a lone dog,small,1,1", "98,a lone cat,large,3,5")
    done = evaluated("--table", table, "--json", tmp_path / "out.json")
    assert "2 of 32 prompts lack 2 of 64 scores; not judged, but learnt from" in " ".join(done.stderr.split())
    found = json.loads((tmp_path / "out.json").read_text())["k-NN"]
    assert (found["prompts"], found["left_out"]) == (30, 2)


def test_a_kind_column_names_the_kinds(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv")
    lines = table.read_text().splitlines()
    kinds = ["kind", *(f"sort {i // 2 % 2}" for i in range(60))]
    table.write_text("\n".join(f"{line},{kind}" for line, kind in zip(lines, kinds, strict=True)))
    assert set(figures("--table", table)["k-NN"]["selection"]["1.00"]["kinds"]) == {"sort 0", "sort 1"}


def test_a_profile_that_was_interrupted_is_fitted_and_judged(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    rows = pyarrow.parquet.read_table(folder / "quality.parquet").to_pylist()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:-1]), folder / "quality.parquet")
    fitted = catimage("router", "fit", folder)
    assert fitted.exit_code == 0, fitted.output
    assert "1 of 14 prompts lack 1 of 42 scores; filled in from their other scores" in " ".join(fitted.stderr.split())
    judged = evaluated(folder, "--folds", 3)
    assert judged.exit_code == 0, judged.output
    assert "13 held-out prompts, 3 candidates" in judged.stdout


ONE = (("small", 1, 1),)
LEVEL = (("small", 1, 3), ("large", 2, 3))


@pytest.mark.parametrize(
    ("pairs", "more", "options", "said"),
    [
        pytest.param(PAIR, ["3,a dog of 3,small,1,1"], [], "stands here twice", id="duplicate"),
        pytest.param(PAIR, ["99,x,small,nan,1"], [], "line 62: the score is 'nan'", id="nan-score"),
        pytest.param(PAIR, ["99,x,small,inf,1"], [], "line 62: the score is 'inf'", id="infinite-score"),
        pytest.param(PAIR, ["99,x,small,1,2"], [], "'small' costs 2.0, but 1.0 before", id="two-costs"),
        pytest.param(PAIR, ["99,x,small,1,-1"], [], "costs -1.0, but 1.0 before", id="negative-cost"),
        pytest.param(PAIR, ["99,x"], [], "line 62: the row ends early", id="cut-off"),
        pytest.param(ONE, [], [], "the candidates small all cost 1", id="one-candidate"),
        pytest.param(LEVEL, [], [], "the candidates small, large all cost 3", id="all-costs-equal"),
        pytest.param(PAIR, [], ["--k", "25"], "k is 25, but the table has 24 prompts", id="fewer-prompts-than-k"),
        pytest.param(PAIR, [], ["--folds", "31"], "31 folds of 30 different prompts", id="fewer-prompts-than-folds"),
        pytest.param(PAIR, [], ["--plot", "curves.jpeg"], "--plot is 'curves.jpeg'", id="picture-of-another-kind"),
        pytest.param(PAIR, [], ["--json", "/"], "--json is the folder '/'", id="json-is-a-folder"),
        pytest.param(PAIR, [], ["--json", f"{__file__}/a.json"], f"{__file__} is no folder", id="json-in-a-file"),
        pytest.param(PAIR, [], ["--features", "text-encoder"], "a table has none", id="no-text-encoder"),
        pytest.param(PAIR, [], ["--train", "nowhere.csv"], "nowhere.csv", id="no-training-file"),
    ],
)
def test_bad_tables_are_one_line_and_exit_code_2(
    tmp_path: Path, pairs: tuple, more: list[str], options: list[str], said: str
) -> None:
    refused(catimage("router", "eval", "--table", write(tmp_path / "t.csv", range(30), pairs, *more), *options), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "lacks the columns prompt_id, prompt, candidate, score, cost", id="empty"),
        pytest.param(f"{HEADER}\n", "no rows below the header", id="header-alone"),
        pytest.param("prompt,model,score\na,b,1\n", "lacks the columns prompt_id, candidate, cost", id="other-columns"),
        pytest.param(f"{HEADER}\n1,a,x,1,1\n2,b,y,1,2\n", "none of the 2 prompts has a score", id="all-partial"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    refused(catimage("router", "eval", "--table", tmp_path / "t.csv"), said)


@pytest.mark.parametrize(
    ("pairs", "prompts", "said"),
    [
        pytest.param(PAIR, range(10), "all 10 training prompts are among the 10 test prompts", id="nothing-left"),
        pytest.param((*PAIR, ("huge", 3, 9)), range(10, 40), "candidates small, large, huge", id="another-candidate"),
        pytest.param(ONE, range(10, 40), "one table has the candidates small, the other", id="a-candidate-short"),
    ],
)
def test_training_files_that_do_not_fit(tmp_path: Path, pairs: tuple, prompts: range, said: str) -> None:
    table, train = write(tmp_path / "table.csv", range(10)), write(tmp_path / "train.csv", prompts, pairs)
    refused(evaluated("--table", table, "--train", train), said)


def test_one_source_is_asked_for(tmp_path: Path, tiny_catalog: Path) -> None:
    refused(catimage("router", "eval"), "accepted: one of the two")
    refused(catimage("router", "eval", tiny_catalog, "--table", RATINGS), "accepted: one of the two")
    refused(catimage("router", "eval", tiny_catalog, "--train", RATINGS), "accepted: --train with --table")


def test_scores_cut_off_by_a_crash(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    scores = folder / "quality.parquet"
    scores.write_bytes(scores.read_bytes()[:-20])
    for command in ("fit", "eval"):
        refused(catimage("router", command, folder), "quality.parquet is not a whole Parquet file")


@pytest.mark.parametrize(
    "change", [lambda names: names[::-1], lambda names: ["other", *names[1:]]], ids=["order", "another"]
)
def test_a_router_of_another_catalog_draws_nothing(tiny_catalog: Path, tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    (folder / "checksums.json").unlink()
    described = json.loads((folder / "router" / "router.json").read_text())
    described["candidates"] = change(described["candidates"])
    (folder / "router" / "router.json").write_text(json.dumps(described))
    done = catimage("generate", "a dog", "--catalog", folder, "--out", tmp_path / "out")
    refused(done, "the router was fitted for the candidates")
    assert not list((tmp_path / "out").glob("*.png"))


def refused(done: Any, said: str) -> None:
    """Exit code 2 and one line that holds ``said``; nothing on standard output."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    said_lines = [line for line in done.stderr.splitlines() if line.startswith("catimage: ")]
    lines = [line for line in said_lines if " prompts lack " not in line]  # which says what is done, not what is wrong
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
