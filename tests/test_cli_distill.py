"""catimage distill: recipes from the command line, and one line where something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from catimage_accel.cli import app


def catimage(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """A decoder's, which needs no pictures."""
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\n")
    training = {"steps": 50, "batch_size": 2, "learning_rate": 1e-3, "warmup": 1, "precision": "fp32"}
    values = {
        "model": str(tiny_sd_folder), "prompts": "words.txt", "number": 2, "steps": 1, "guidance_scale": 1.0,
        "training": training,
    }  # fmt: skip
    path = tmp_path / "narrow.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def test_a_decoder_is_made_and_its_folder_told(recipe: Path, tmp_path: Path) -> None:
    done = catimage("distill", "decoder", recipe, "--work", tmp_path / "work", "--steps", 2, "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "written to" in done.output
    assert (tmp_path / "work" / "narrow" / "vae" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["steps", "student-9"], "student-9 is no file; accepted: a TOML file, or the name of a shipped recipe: "),
        (["architecture", "RECIPE"], "but there is no such key; accepted: model, data, "),
        (["guidance", "RECIPE"], "but there is no such key; accepted: model, prompts, number, "),
        (["decoder", "RECIPE", "--device", "cuda"], "device is 'cuda', but torch sees no CUDA device"),
    ],
    ids=["no such recipe", "a recipe of another kind", "a decoder's for a student", "no such device"],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    recipe: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    given = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = catimage("distill", *given, "--work", tmp_path / "work")
    assert done.exit_code == 2
    assert told in done.output
    assert "Traceback" not in done.output
    assert not list((tmp_path / "work").glob("*/checkpoint.safetensors"))


def test_launchers_that_take_a_module_find_the_command() -> None:
    """`accelerate launch -m catimage_accel.cli`."""
    done = subprocess.run(
        [sys.executable, "-m", "catimage_accel.cli", "distill", "steps", "student-9"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "student-9 is no file" in done.stderr
