"""The gate that keeps a low precision from costing quality unseen."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.cli import app
from catimage_accel.executor import Executor
from catimage_accel.quality_gate import Gated, gate, read_gate, twin_of, write_gate
from catimage_accel.quantize import LayerQuantization, Quantization, weights_sha256

CPU = torch.device("cpu")
PROMPTS = [f"{number} bees" for number in range(10)]


def candidate(name: str, **more: Any) -> Candidate:
    return Candidate(name, **{"model": "m", "steps": 3, "sampler": "ddim", "guidance_scale": 3.0, **more})


INT8 = candidate("low", precision="int8", quantization="q")


def test_the_twin_of_a_candidate_that_an_int8_engine_draws_takes_any_engine() -> None:
    assert twin_of(dataclasses.replace(INT8, engine="triton"), [INT8], torch.device("cpu")).engine == "auto"


@pytest.mark.parametrize(
    ("others", "device", "name"),
    [
        pytest.param([candidate("full")], "cpu", "full", id="the-one-in-the-catalog"),
        pytest.param([candidate("more", steps=4)], "cpu", "low-fp32", id="other-steps-are-no-twin"),
        pytest.param([candidate("deep", options={"deepcache_interval": 2})], "cpu", "low-fp32", id="nor-other-options"),
        pytest.param([candidate("full")], "cuda", "low-fp16", id="half-precision-on-a-gpu"),
    ],
)
def test_the_twin_differs_in_precision_alone(others: list[Candidate], device: str, name: str) -> None:
    twin = twin_of(INT8, [INT8, *others], torch.device(device))
    assert twin.name == name
    assert twin.precision == ("fp16" if device == "cuda" else "fp32")
    assert dataclasses.replace(twin, name="low", precision="int8", quantization="q") == INT8


class Judge:
    """Pictures and texts as unit vectors: a picture's by its mean brightness."""

    def embed_images(self, images: list[np.ndarray]) -> np.ndarray:
        angle = np.array([image.mean() / 255 for image in images])
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return np.tile([1.0, 0.0], (len(texts), 1))


class Brightness:
    """An executor whose pictures have a brightness by candidate and seed."""

    def __init__(self, **brightness: int) -> None:
        self.brightness = brightness

    def run(self, jobs: Any) -> Any:
        for job in jobs:
            value = self.brightness[job.candidate.name] + job.generator.initial_seed() % 2
            image = np.full((4, 4, 3), value, dtype=np.uint8)
            yield dataclasses.replace(FINISHED, key=job.key, job=job, image=image)


@dataclasses.dataclass(frozen=True)
class Finished:
    key: Any = None
    job: Any = None
    image: Any = None
    error: Any = None


FINISHED = Finished()


@pytest.mark.parametrize(
    ("brightness", "passed"),
    [
        pytest.param(50, True, id="the-same-picture"),
        pytest.param(53, True, id="a-little-further-from-the-text"),
        pytest.param(70, False, id="clip-score-lost"),
    ],
)
def test_a_candidate_passes_if_it_loses_little(brightness: int, passed: bool) -> None:
    executor = Brightness(low=brightness, full=50)
    found = gate(INT8, candidate("full"), executor, Judge(), PROMPTS)  # type: ignore[arg-type]
    assert found.passed is passed
    assert found.images == len(PROMPTS)
    assert found.change_low <= found.change <= found.change_high
    assert (found.change < 0) == (brightness > 50)


def test_a_picture_far_from_its_twins_fails_though_it_scores_as_well() -> None:
    executor = Brightness(low=20, full=150)
    found = gate(INT8, candidate("full"), executor, Judge(), PROMPTS)  # type: ignore[arg-type]
    assert found.change > 0
    assert found.distance > 0.05
    assert not found.passed


@pytest.mark.parametrize(
    ("one", "prompts", "message"),
    [
        pytest.param(candidate("full"), PROMPTS, "precision fp32; accepted: int8 or fp8", id="not-a-low-precision"),
        pytest.param(INT8, [], "no prompt to compare by", id="no-prompts"),
    ],
)
def test_what_cannot_be_compared_is_refused(one: Candidate, prompts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(one, candidate("full"), Executor(device="cpu"), Judge(), prompts)  # type: ignore[arg-type]


def some(name: str, **more: float) -> Gated:
    figures = dict.fromkeys(("clip_score", "twin_clip_score", "change_low", "change_high", "seed_distance"), 0.5)
    return Gated(candidate=name, twin="full", images=5, **{**figures, "change": 0.0, "distance": 0.01, **more})


def test_figures_are_kept_by_candidate(tmp_path: Path) -> None:
    assert read_gate(tmp_path) == {}
    write_gate(tmp_path, [some("one"), some("two")])
    write_gate(tmp_path, [some("two", change=-0.02)])
    found = read_gate(tmp_path)
    assert found["one"].passed
    assert not found["two"].passed
    (tmp_path / "gate.json").write_text('{"gated": [{"candidate": 3}]}')
    with pytest.raises(ValueError, match=r"gate\.json: "):
        read_gate(tmp_path)


def test_the_command_without_a_quantized_candidate_says_how_to_make_one(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    done = CliRunner().invoke(app, ["gate", str(folder)])
    assert done.exit_code == 2
    assert "has no candidate in int8 or fp8; make one with `catimage quantize" in done.output
    assert Catalog.load(folder)


def test_the_command_holds_an_int8_candidate_against_its_twin(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    scales = LayerQuantization(torch.ones(16), torch.tensor(4.0), None, None)
    quantization = Quantization("int8", "int8", {"conv_in": scales}, {}, weights_sha256(folder / "model"), {}, {})
    quantization.save(folder / "quantized" / "some")
    catalog = Catalog.load(folder)
    low = dataclasses.replace(catalog.candidate("dear-4"), name="low", precision="int8", quantization="quantized/some")
    dataclasses.replace(catalog, candidates=(*catalog.candidates, low), flops={}, milliseconds={}).save(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))

    done = CliRunner().invoke(app, ["gate", str(folder), "--prompts", str(folder / "prompts.txt"), "--json"])
    [row] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert row["candidate"] == "low"
    assert row["twin"] == "dear-4"
    assert row["images"] == len(PROMPTS)
    assert 0 < row["distance"] < row["seed_distance"], "nearer to its twin than another picture is"
    assert done.exit_code == (0 if row["passed"] else 1)
    assert read_gate(folder)["low"].passed == row["passed"]
    Catalog.load(folder)  # checksums cover the new file
