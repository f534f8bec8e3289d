"""catimage quantize: scales and candidates on disk, or one line and exit code 2."""

from __future__ import annotations

import builtins
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from catimage_accel import Catalog
from catimage_accel.cli import app
from catimage_accel.quantize import Quantization

FAST = ["--number", 4, "--rows", 16]


def catimage(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def catalog(tiny_catalog: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_catalog, tmp_path / "catalog")
    return tmp_path / "catalog"


def test_candidates_of_one_unet_share_a_quantization(catalog: Path) -> None:
    done = catimage("quantize", catalog, "--candidate", "cheap-2", "--candidate", "dear-4", "--budget", 0.2, *FAST)
    assert done.exit_code == 0, done.output
    loaded = Catalog.load(catalog)  # checksums included
    names = [one.name for one in loaded.candidates]
    assert names == ["cheap-2", "middle-3", "dear-4", "cheap-2-int8", "dear-4-int8"]
    for name in ("cheap-2", "dear-4"):
        made, source = loaded.candidate(f"{name}-int8"), loaded.candidate(name)
        assert (made.precision, made.engine, made.quantization) == ("int8", "auto", "quantized/unet-int8")
        assert (made.steps, made.sampler, made.guidance_scale) == (source.steps, source.sampler, source.guidance_scale)
        assert loaded.flops[made.name] == loaded.flops[name]
    folder = catalog / "quantized" / "unet-int8"
    assert sorted(path.name for path in folder.iterdir()) == ["quantization.json", "report.json", "scales.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["unet-int8"]
    quantization = Quantization.load(folder)
    quantization.check_source(catalog / "model")
    assert quantization.calibration["candidates"] == ["cheap-2", "dear-4"]
    assert (quantization.calibration["prompts"], quantization.calibration["samples"]) == (4, 8 + 16)
    assert quantization.calibration["steps"] == [2, 4]
    assert any(why.startswith("sensitive") for why in quantization.kept.values())
    report = json.loads((folder / "report.json").read_text())
    assert report["digest"] == quantization.digest
    shown = done.stdout.split("layer", 1)[1]
    for layer in report["layers"]:
        assert f" {layer['name']} " in shown
        assert (layer["precision"] == "int8") == (layer["name"] in quantization.layers)
    assert all(line.startswith("catimage: ") for line in done.stderr.splitlines() if "candidate " in line)


def test_again_with_another_recipe_replaces(catalog: Path) -> None:
    assert catimage("quantize", catalog, "--candidate", "cheap-2", "--out", "mine", *FAST).exit_code == 0
    first = Quantization.load(catalog / "quantized" / "mine")
    again = catimage(
        "quantize", catalog, "--candidate", "cheap-2", "--out", "mine", "--recipe", "int8-smoothquant", "--no-outputs",
        "--percentile", 100, "--budget", 0, *FAST,
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    loaded = Catalog.load(catalog)
    assert [one.name for one in loaded.candidates] == ["cheap-2", "middle-3", "dear-4", "cheap-2-int8"]
    second = Quantization.load(catalog / "quantized" / "mine")
    assert second.digest != first.digest
    assert second.kept == {}
    assert all(scales.output_amax is None for scales in second.layers.values())
    assert any(scales.input_scale is not None for scales in second.layers.values())
    assert [path.name for path in (catalog / "quantized").iterdir()] == ["mine"]


def test_the_same_command_makes_the_same_scales(catalog: Path) -> None:
    for name in ("one", "two"):
        assert catimage("quantize", catalog, "--candidate", "cheap-2", "--out", name, *FAST).exit_code == 0
    digests = {Quantization.load(catalog / "quantized" / name).digest for name in ("one", "two")}
    assert len(digests) == 1


def test_fp8_and_prompts_of_a_file(catalog: Path, tmp_path: Path) -> None:
    (catalog / "quality.parquet").unlink()
    (catalog / "checksums.json").unlink()
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\n")
    done = catimage(
        "quantize", catalog, "--candidate", "cheap-2", "--recipe", "fp8", "--prompts", tmp_path / "prompts.txt", *FAST
    )
    assert done.exit_code == 0, done.output
    made = Catalog.load(catalog).candidate("cheap-2-fp8")
    assert (made.precision, made.quantization) == ("fp8", "quantized/unet-fp8")
    assert json.loads((catalog / "quantized" / "unet-fp8" / "report.json").read_text())["percentile"] == 100
    assert Quantization.load(catalog / "quantized" / "unet-fp8").calibration["prompts"] == 2
    assert not (catalog / "checksums.json").exists()


def integers(catalog: Path) -> None:
    path = catalog / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.int8)
    safetensors.torch.save_file(weights, path)


def quantized_candidate(catalog: Path) -> None:
    text = (catalog / "catalog.toml").read_text()
    added = text[text.index("[[candidate]]") :].split("[[candidate]]")[1].replace("cheap-2", "small")
    added = added.replace('precision = "fp32"', 'precision = "int8"\nquantization = "quantized/x"')
    (catalog / "catalog.toml").write_text(f"{text}\n[[candidate]]{added}")


def no_scores(catalog: Path) -> None:
    (catalog / "quality.parquet").unlink()


def empty_file(catalog: Path) -> None:
    (catalog / "prompts.txt").write_text("\n\n")


@pytest.mark.parametrize(("spoil", "arguments", "said"), [
    pytest.param(None, ["--candidate", "cheap-3"], "candidate is 'cheap-3'; catalog 'tiny' has cheap-2", id="name"),
    pytest.param(None, ["--candidate", "cheap-2", "--recipe", "int4"], "recipe is 'int4'; accepted: int8", id="recipe"),
    pytest.param(None, ["--candidate", "cheap-2", "--out", "../x"], "out is '../x'", id="out of the folder"),
    pytest.param(quantized_candidate, ["--candidate", "small"], "'small' is quantized", id="quantized candidate"),
    pytest.param(no_scores, ["--candidate", "cheap-2"], "give --prompts FILE", id="no prompts known"),
    pytest.param(
        empty_file, ["--candidate", "cheap-2", "--prompts", "prompts.txt"], "which has no prompts", id="no prompts"
    ),
    pytest.param(integers, ["--candidate", "cheap-2"], "conv_in.weight is I8", id="integer weights"),
])  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(
    catalog: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None] | None, arguments: list[str],
    said: str,
) -> None:  # fmt: skip
    if spoil is not None:
        spoil(catalog)
    monkeypatch.chdir(catalog)
    before = files(catalog)
    done = catimage("quantize", catalog, *arguments, *FAST)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("catimage:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert files(catalog) == before


def test_without_modelopt_the_remedy_is_told(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "modelopt":
            raise ModuleNotFoundError("No module named 'modelopt'", name="modelopt")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    done = catimage("quantize", catalog, "--candidate", "cheap-2")
    assert done.exit_code == 2
    assert "pip install 'catimage-accel[quantize]'" in done.stderr


def test_a_quantization_that_fails_leaves_the_old_one(catalog: Path) -> None:
    assert catimage("quantize", catalog, "--candidate", "cheap-2", *FAST).exit_code == 0
    path = catalog / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    safetensors.torch.save_file(weights, path)
    before = files(catalog)
    done = catimage("quantize", catalog, "--candidate", "cheap-2", *FAST)
    assert done.exit_code == 2
    assert "NaN" in done.stderr
    assert files(catalog) == before


def test_models_in_folders_of_one_name_have_a_quantization_each(catalog: Path) -> None:
    loaded = Catalog.load(catalog)
    for name in ("one", "two"):
        shutil.copytree(catalog / "model", catalog / name / "model")
    first = loaded.candidates[0]
    candidates = tuple(dataclasses.replace(first, name=name, model=f"{name}/model") for name in ("one", "two"))
    dataclasses.replace(loaded, candidates=candidates).save(catalog)
    done = catimage("quantize", catalog, "--candidate", "one", "--candidate", "two", *FAST)
    assert done.exit_code == 0, done.output
    made = [one.quantization for one in Catalog.load(catalog).candidates[2:]]
    assert len(set(made)) == 2


def test_who_else_draws_with_scales_that_are_replaced_is_told(catalog: Path) -> None:
    assert catimage("quantize", catalog, "--candidate", "cheap-2", *FAST).exit_code == 0
    done = catimage("quantize", catalog, "--candidate", "dear-4", *FAST)
    told = " ".join(done.stderr.split())
    assert "has new scales, with which cheap-2-int8 draws too: profile and gate it again" in told
    again = catimage("quantize", catalog, "--candidate", "dear-4", "--candidate", "cheap-2", *FAST)
    assert "has new scales" not in again.stderr
