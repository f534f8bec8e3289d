"""Recipes are read strictly, and the shipped ones are all there."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from catimage_accel.snapfusion import recipes
from catimage_accel.snapfusion.recipes import (
    ArchitectureRecipe,
    DecoderRecipe,
    FinetuneRecipe,
    GuidanceRecipe,
    StepsRecipe,
    find_recipe,
    read_recipe,
    shipped,
)

SHIPPED = sorted(shipped().glob("*.toml"))
KINDS = {
    "guidance_rescale": GuidanceRecipe, "teacher_steps": StepsRecipe, "search": ArchitectureRecipe,
    "number": DecoderRecipe,
}  # fmt: skip


def test_there_are_shipped_recipes() -> None:
    assert {"efficient", "decoder", "teacher-16"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    values = tomllib.loads(path.read_text())
    kind = next((kind for key, kind in KINDS.items() if key in values), FinetuneRecipe)
    read_recipe(path, kind)
    assert path.read_text().startswith("# ")
    assert find_recipe(Path(path.stem)) == path


STEPS = """
model = "model"
data = "pictures"
teacher_steps = 16
student_steps = 8
[training]
steps = 10
batch_size = 4
learning_rate = 1e-4
"""


@pytest.mark.parametrize(
    ("asked", "arithmetic", "precision"),
    [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16"), ("fp32", True, "fp32")],
    ids=["the device has bfloat16", "the device imitates it", "asked for all the same", "asked for"],
)
def test_the_precision_is_one_that_the_device_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, arithmetic: bool, precision: str
) -> None:
    monkeypatch.setattr(recipes, "computes_in_bf16", lambda device: arithmetic)
    path = tmp_path / "steps.toml"
    path.write_text(STEPS + f'precision = "{asked}"\n')
    training = read_recipe(path, StepsRecipe).training
    assert training.precision_on(torch.device("cpu")) == precision
    assert training.config(torch.device("cpu"), 0).precision == precision


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (STEPS.replace("teacher_steps", "teacher_step"), "teacher_step is 16, but there is no such key"),
        (STEPS.replace("student_steps = 8", ""), "student_steps is missing"),
        (STEPS.replace("steps = 10", 'steps = "ten"'), "training.steps is 'ten'"),
        (STEPS.replace("1e-4", "-1.0"), "training.learning_rate is -1.0"),
        (STEPS.replace("data", "guidance = [2.0]\ndata"), r"guidance is \[2.0\]"),
        ("model = ", "not valid TOML"),
    ],
    ids=["misspelt", "missing", "a word for a number", "out of range", "half a range", "no TOML"],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "steps.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=told) as error:
        read_recipe(path, StepsRecipe)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_search_has_no_validation(tmp_path: Path) -> None:
    """It is scored round by round: pictures asked for would never be drawn."""
    path = tmp_path / "thin.toml"
    lines = [line for line in STEPS.splitlines() if "teacher_" not in line and "student_" not in line]
    content = "\n".join([*lines, "[search]", "speedup = 1.5", 'judge = "judge"', ""])
    path.write_text(content)
    assert read_recipe(path, ArchitectureRecipe).search.speedup == 1.5
    path.write_text(content + "[validation]\nevery = 100\n")
    with pytest.raises(ValueError, match=r"validation is .* but there is no such key; accepted: model, "):
        read_recipe(path, ArchitectureRecipe)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.toml is missing"):
        read_recipe(tmp_path / "no.toml", StepsRecipe)
    with pytest.raises(FileNotFoundError, match=r"student-9 is no file; .*student-8"):
        find_recipe(Path("student-9"))


def test_a_student_without_guidance_is_not_watched_with_it(tmp_path: Path) -> None:
    path = tmp_path / "guided.toml"
    content = STEPS.replace('data = "pictures"', "number = 8\nguidance_scale = 7.5")
    path.write_text(content + "[validation]\n")
    watched = read_recipe(path, GuidanceRecipe).validation
    assert watched is not None
    assert watched.guidance_scale == 1
    path.write_text(content + "[validation]\nguidance_scale = 7.5\n")
    with pytest.raises(ValueError, match=r"validation\.guidance_scale is 7\.5"):
        read_recipe(path, GuidanceRecipe)
