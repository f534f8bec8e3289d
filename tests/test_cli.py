"""The catimage command: pictures and routes on disk, one line and exit code 2 for bad input, nothing lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from catimage_accel.catalog import Catalog
from catimage_accel.cli import app
from catimage_accel.cli.console import interrupts_wait
from catimage_accel.cli.files import slug
from catimage_accel.engines.eager import EagerEngine
from catimage_accel.engines.protocol import TextState

PROMPTS = ["a dog", "a crown, a castle and three bees"]


def catimage(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routes.jsonl").read_text().splitlines()]


def test_generate_writes_pictures_and_routes(tiny_catalog: Path, tmp_path: Path) -> None:
    done = catimage("generate", *PROMPTS, "--catalog", tiny_catalog, "--tradeoff", 0.05, "--seed", 7, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = sorted(rows(tmp_path), key=lambda row: row["index"])
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["seed"] for row in found] == [7, 8]
    assert [row["candidate"] for row in found] == ["cheap-2", "dear-4"]
    assert [row["file"] for row in found] == ["0000-a-dog.png", "0001-a-crown-a-castle-and-three-bees.png"]
    assert all(set(row["predicted_quality"]) == {"cheap-2", "middle-3", "dear-4"} for row in found)
    assert all(row["cost"] > 0 and row["milliseconds"] > 0 for row in found)
    assert [Image.open(tmp_path / row["file"]).size for row in found] == [(64, 64)] * 2
    assert "always dear-4" in done.stdout
    assert "56%" in done.stdout  # (1 + 8) / 16
    assert not list(tmp_path.glob(".*"))


def test_generate_draws_with_the_cheapest_that_reaches_a_quality(tiny_catalog: Path, tmp_path: Path) -> None:
    done = catimage("generate", *PROMPTS, "--catalog", tiny_catalog, "--min-quality", 0.25, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert {row["prompt"]: row["candidate"] for row in rows(tmp_path)} == dict(
        zip(PROMPTS, ["cheap-2", "dear-4"], strict=True)
    )


def test_a_second_run_overwrites_nothing(tiny_catalog: Path, tmp_path: Path) -> None:
    run = ["generate", "a dog", "--catalog", tiny_catalog, "--seed", 1, "--out", tmp_path, "--candidate", "cheap-2"]
    assert catimage(*run).exit_code == 0
    before = (tmp_path / "0000-a-dog.png").read_bytes()
    with (tmp_path / "routes.jsonl").open("a") as file:
        file.write('{"index": 1, "half a li')  # what a power cut may leave
    assert catimage(*run, "--height", 32).exit_code == 0
    assert (tmp_path / "0000-a-dog.png").read_bytes() == before
    assert [row["file"] for row in rows(tmp_path)] == ["0000-a-dog.png", "0001-a-dog.png"]
    assert Image.open(tmp_path / "0001-a-dog.png").size == (64, 32)


def test_json_prints_the_rows_alone(tiny_catalog: Path, tmp_path: Path) -> None:
    done = catimage("generate", *PROMPTS, "--catalog", tiny_catalog, "--budget", 8, "--out", tmp_path, "--json")
    assert done.exit_code == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows(tmp_path)


def test_a_bad_line_in_a_file_is_reported_and_the_rest_drawn(tiny_catalog: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa dog\n\n".encode() + b"a \xff cat\r\n" + b"a \x07 bell\n" + "ein Löwe".encode())
    out = tmp_path / "out"
    done = catimage("generate", "--prompts", file, "--catalog", tiny_catalog, "--candidate", "cheap-2", "--out", out)
    assert done.exit_code == 1
    assert f"{file}:3:" in done.stderr
    assert "not UTF-8" in done.stderr
    assert f"{file}:4:" in done.stderr
    assert sorted(row["prompt"] for row in rows(out)) == ["a dog", "ein Löwe"]
    assert sorted(path.name for path in out.glob("*.png")) == ["0000-a-dog.png", "0001-ein-lowe.png"]


def test_a_prompt_that_fails_under_way_loses_no_other(
    tiny_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = EagerEngine.encode_prompts

    def encode_but_castles(self: EagerEngine, prompts: Sequence[str]) -> list[TextState]:
        if any("castle" in prompt for prompt in prompts):
            raise RuntimeError("no castles")
        return encode(self, prompts)

    monkeypatch.setattr(EagerEngine, "encode_prompts", encode_but_castles)
    done = catimage("generate", *PROMPTS, "a bee", "--catalog", tiny_catalog, "--out", tmp_path)
    assert done.exit_code == 1
    assert "prompt 2, 'a crown, a castle and three bees', was not drawn: RuntimeError: no castles" in " ".join(
        done.stderr.split()
    )
    assert sorted(row["prompt"] for row in rows(tmp_path)) == ["a bee", "a dog"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0000-a-dog.png", "0002-a-bee.png"]


def test_a_long_prompt_is_drawn_with_a_warning(tiny_catalog: Path, tmp_path: Path) -> None:
    prompt = "a dog and " * 30
    done = catimage("generate", prompt, "--catalog", tiny_catalog, "--candidate", "cheap-2", "--out", tmp_path)
    assert done.exit_code == 0
    assert "cut off" in done.stderr
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        pytest.param("../../etc/passwd", "etc-passwd", id="path"),
        pytest.param("日本語", "picture", id="no-latin-letter"),
        pytest.param("con\\nul\0:a", "con-nul-a", id="reserved"),
        pytest.param("x" * 300, "x" * 48, id="too-long-for-a-file-name"),
    ],
)
def test_file_names_come_from_no_prompt_unchanged(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["--tradeoff", "nan", "a dog"], ["tradeoff is nan"], id="nan-tradeoff"),
        pytest.param(["--tradeoff", "-1", "a dog"], ["tradeoff is -1.0", ">= 0"], id="negative-tradeoff"),
        pytest.param(["--budget", "0.1", "a dog"], ["budget is 0.1", "cheap-2"], id="budget-under-the-cheapest"),
        pytest.param(["--candidate", "best", "a dog"], ["'best'", "cheap-2"], id="unknown-candidate"),
        pytest.param(["--min-quality", "nan", "a dog"], ["min_quality is nan"], id="nan-quality"),
        pytest.param(["--min-quality", "1", "--budget", "3", "a dog"], ["budget and min_quality are given"], id="two"),
        pytest.param(["--height", "63", "a dog"], ["height is 63", "multiples of 4"], id="wrong-size"),
        pytest.param(["--device", "tpu9", "a dog"], ["'tpu9'", "accepted"], id="unknown-device"),
        pytest.param(["--prompts", "no-such.txt"], ["'no-such.txt'", "one prompt a line"], id="no-prompts-file"),
        pytest.param(["--prompts", "/dev/null"], ["/dev/null"], id="not-a-regular-file"),
        pytest.param([], ["no prompt"], id="no-prompt"),
        pytest.param(["--catalog", "nothing", "a dog"], ["'nothing'", "'emoji'"], id="unknown-catalog"),
        pytest.param(["--out", "/dev/null/out", "a dog"], ["'/dev/null/out'", "Not a directory"], id="unwritable-out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_catalog: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    catalog = [] if "--catalog" in arguments else ["--catalog", str(tiny_catalog)]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    done = catimage("generate", *arguments, *catalog, *out)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "loading" not in line and line.strip()]
    for part in parts:
        assert part in line
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_tampered_catalog_draws_nothing(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    with (folder / "costs.json").open("a") as file:
        file.write("\n")
    done = catimage("generate", "a dog", "--catalog", folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "costs.json" in done.stderr
    assert not (tmp_path / "out").exists()


def test_candidates_lists_costs_and_qualities(tiny_catalog: Path) -> None:
    lines = catimage("candidates", "--catalog", tiny_catalog, "--json").stdout.splitlines()
    listed = [json.loads(line) for line in lines]
    assert [row["name"] for row in listed] == ["dear-4", "middle-3", "cheap-2"]
    assert [row["gflop"] for row in listed] == [8.0, 3.0, 1.0]
    assert listed[0]["quality"] == pytest.approx(0.3)
    table = catimage("candidates", "--catalog", tiny_catalog)
    assert table.exit_code == 0
    assert "dpmsolver++" in table.stdout


def test_candidates_are_listed_whatever_is_not_measured_yet(tiny_catalog: Path, tmp_path: Path) -> None:
    """As after a profile that was stopped, and with a candidate that was written into the file since."""
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    (folder / "checksums.json").unlink()
    scores = pyarrow.parquet.read_table(folder / "quality.parquet")
    kept = [row for row in scores.to_pylist() if (row["candidate"], row["prompt"]) != ("dear-4", "a dog")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept, scores.schema), folder / "quality.parquet")
    with (folder / "catalog.toml").open("a") as file:
        file.write('[[candidate]]\nname = "new"\nmodel = "model"\nsteps = 1\nsampler = "ddim"\nguidance_scale = 1\n')
    lines = catimage("candidates", "--catalog", folder, "--json").stdout.splitlines()
    listed = {row["name"]: (row["gflop"], row["quality"]) for row in map(json.loads, lines)}
    assert listed["new"] == (None, None)
    assert listed["dear-4"][1] == pytest.approx(0.3)
    assert catimage("candidates", "--catalog", folder).exit_code == 0


def test_a_candidate_can_be_taken_out_of_a_profiled_catalog(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    (folder / "checksums.json").unlink()
    catalog = Catalog.load(folder)
    replace(catalog, candidates=tuple(one for one in catalog.candidates if one.name != "middle-3")).save(folder)
    done = catimage("router", "fit", folder, "--features", "ngrams")
    assert done.exit_code == 0, done.output


def test_demo_draws_its_prompts_and_a_contact_sheet(tiny_catalog: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = catimage("demo", "--catalog", tiny_catalog, "--out", tmp_path)
        assert done.exit_code == 0, done.output
        found = rows(tmp_path)
        assert len(found) >= 16
        assert len({row["prompt"] for row in found}) == len(found) == len(list(tmp_path.glob("0*.png")))
    assert Image.open(tmp_path / "contact_sheet.png").width > 1000
    assert "share of that cost" in done.stdout


def test_ctrl_c_keeps_what_is_finished(tiny_catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n" * 2000)
    # Tests that run as a shell's background job inherit that SIGINT is ignored.
    command = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from catimage_accel.cli import app; app()"
    )
    process = subprocess.Popen(
        [
            sys.executable, "-c", command, "generate", "--candidate", "dear-4",
            "--prompts", str(tmp_path / "prompts.txt"), "--catalog", str(tiny_catalog), "--out", str(tmp_path / "out"),
        ],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    routes = tmp_path / "out" / "routes.jsonl"
    deadline = time.monotonic() + 120
    while not (routes.exists() and routes.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    kept = rows(tmp_path / "out")
    assert 0 < len(kept) < 2000
    assert sorted(row["file"] for row in kept) == sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert "dear-4" in stdout


def test_ctrl_c_between_a_picture_and_its_row_waits_for_the_row() -> None:
    written = []

    def write() -> None:
        with interrupts_wait():
            written.append("picture")
            signal.raise_signal(signal.SIGINT)
            written.append("row")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert written == ["picture", "row"]


def test_profile_fit_and_eval_make_a_bare_catalog_usable(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    for name in ("costs.json", "quality.parquet"):
        (folder / name).unlink()
    shutil.rmtree(folder / "router")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a dog and {number} cats\n" for number in range(6)))
    profiled = catimage("profile", folder, "--prompts", prompts, "--batch", 1, "--chunk", 4)
    assert profiled.exit_code == 0, profiled.output
    assert "18 scores added" in profiled.stderr
    assert profiled.stderr.count("images to draw") == profiled.stderr.count("18 images to draw, about") == 1
    again = catimage("profile", folder, "--prompts", prompts, "--no-timing")
    assert "0 scores added" in again.stderr
    fitted = catimage("router", "fit", folder, "--features", "text-encoder")
    assert fitted.exit_code == 0, fitted.output
    judged = catimage("router", "eval", folder, "--folds", 3, "--json", "-", "--plot", tmp_path / "curves.png")
    assert json.loads(judged.stdout)["k-NN"]["prompts"] == 6
    assert Image.open(tmp_path / "curves.png").width > 100
    drawn = catimage("generate", "a dog", "--catalog", folder, "--out", tmp_path / "out")
    assert drawn.exit_code == 0, drawn.output


def test_profile_scores_one_drawing_by_several_metrics(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    prompts, head = tmp_path / "prompts.txt", tmp_path / "head.pth"
    prompts.write_text("two dogs\nthree cats\n")
    torch.save(torch.nn.Linear(8, 1).state_dict(), head)
    run = ["profile", folder, "--prompts", prompts, "--no-timing", "--chunk", 1, "--metric", "sharpness"]
    before = pyarrow.parquet.read_table(folder / "quality.parquet").num_rows
    first = catimage(*run)
    assert first.exit_code == 0, first.output
    assert "6 images to draw, how long is told after the first chunk on" in first.stderr
    assert "3 images to draw, about" in first.stderr
    assert "6 scores added" in first.stderr
    both = [*run, "--metric", "aesthetic", "--aesthetic-head", head, "--aesthetic-clip", folder / "judge"]
    second = catimage(*both, "--metric", "aesthetic")
    assert "6 scores added" in second.stderr, second.output
    rows = pyarrow.parquet.read_table(folder / "quality.parquet").to_pylist()
    found = [row["metric"] for row in rows if row["prompt"] in ("two dogs", "three cats")]
    assert {name: found.count(name) for name in found} == {"sharpness": 6, "aesthetic": 6}
    assert len(rows) == before + 12
    again = catimage(*both)
    assert "0 scores added" in again.stderr
    assert "to draw" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["--metric", "beauty"], ["'beauty'", "accepted: clip_score, sharpness"], id="unknown-metric"),
        pytest.param(["--metric", "aesthetic"], ["--aesthetic-clip and --aesthetic-head"], id="no-head"),
        pytest.param(["--metric", "image_reward"], ["needs --image-reward"], id="no-reward-model"),
        pytest.param(
            ["--metric", "image_reward", "--image-reward", "./nowhere"], ["no folder ./nowhere"], id="no-such-model"
        ),
    ],
)
def test_a_metric_that_cannot_score_draws_nothing(
    tiny_catalog: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    (folder / "costs.json").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two dogs\n")
    done = catimage("profile", folder, "--prompts", prompts, *arguments)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "loading" not in line and line.strip()]
    for part in parts:
        assert part in line
    assert not (folder / "costs.json").exists(), "it is said before anything is measured"
    assert catimage("profile", folder, "--metric", "sharpness").exit_code == 2, "there are no prompts to score"


def test_the_zoo_is_mounted() -> None:
    assert "train" in catimage("zoo", "--help").stdout
