"""``catimage engine build``: what a catalog's candidates need is built once, and what can't be is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from catimage_accel.cli import app
from catimage_accel.engines.tensorrt.api import TENSORRT, TENSORRT_RTX


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path / "engines"))
    return tmp_path / "engines"


def build(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["engine", "build", *map(str, arguments), "--device", "cpu"])


def rows(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_builds_without_a_device(tiny_catalog: Path) -> None:
    """The candidate uses DeepCache: three graphs of the UNet, and the decoder."""
    asked = (tiny_catalog, "--candidate", "middle-3", "--engine", "tensorrt-rtx", "--rows", 2, "--json")
    first = build(*asked)
    assert first.exit_code == 0, first.output
    found = rows(first)
    assert [row["component"] for row in found] == ["unet", "unet-deep", "unet-shallow", "vae_decoder"]
    assert {row["profile"] for row in found} == {"rows=2,height=16,width=16,tokens=24"}
    assert all(row["from"] == "built" and row["seconds"] > 0 and row["bytes"] > 10**5 for row in found)
    assert all((row["int8_layers"], row["quantized_weights"]) == (0, 0) and row["layers"] > 5 for row in found)
    again = build(*asked)
    assert [row["from"] for row in rows(again)] == ["cached"] * 4
    assert [row["digest"] for row in rows(again)] == [row["digest"] for row in found]


def test_candidates_share_what_they_have_in_common(tiny_catalog: Path) -> None:
    """ "cheap-2" and "dear-4" have the same UNet and decoder."""
    done = build(tiny_catalog, "--candidate", "cheap-2", "--candidate", "dear-4", "--engine", "onnxruntime")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("onnxruntime") == 2
    assert "unet (unet)" in done.stdout
    assert "vae_decoder (vae)" in done.stdout


@pytest.mark.skipif(TENSORRT.installed, reason="TensorRT is installed")
def test_a_missing_library_is_told(tiny_catalog: Path, cache: Path) -> None:
    done = build(tiny_catalog, "--candidate", "cheap-2", "--engine", "tensorrt")
    assert done.exit_code == 1
    assert "TensorRT is not installed; pip install 'catimage-accel[tensorrt]'" in done.stderr
    assert not list(cache.glob("[0-9a-f]*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--engine", "eager"), "engine is 'eager'; accepted: "),
        (("--engine", "nothing"), "engine is 'nothing'; accepted: "),
        (("--candidate", "nobody"), "candidate is 'nobody'"),
    ],
    ids=["an engine that is not built", "no engine", "no candidate"],
)
def test_what_there_is_not(tiny_catalog: Path, option: tuple[str, str], message: str) -> None:
    done = build(tiny_catalog, *option)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2
