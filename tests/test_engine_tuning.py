"""Engines timed side by side; the fastest runs, and its times are what routing weighs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from catimage_accel import RoutedPipeline
from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.cli import app
from catimage_accel.costs import Milliseconds, fastest, ranked_engines
from catimage_accel.engine_tuning import tune_engines, tuned_catalog
from catimage_accel.profiling import profiled_device

CPU = torch.device("cpu")
TIMES: Milliseconds = {
    "Big CPU, 8 threads": {
        "eager": {"a": {"1": 10.0, "4": 8.0}, "b": {"1": 20.0, "4": 16.0}},
        "onnxruntime": {"a": {"1": 4.0, "4": 7.0}, "b": {"1": 9.0, "4": 15.0}},
        "openvino": {"a": {"1": 6.0, "4": 3.0}},
        "compiled": {"a": {"1": 1.0, "4": 1.0}},  # the fastest, but not chosen unasked
    },
    "Other CPU (AVX2), 4 threads": {"eager": {"a": {"1": 3.0}}, "onnxruntime": {"a": {"1": 4.0}}},
    "Other CPU (AVX512), 4 threads": {"onnxruntime": {"a": {"1": 3.0}}, "openvino": {"a": {"1": 4.0}}},
    "NVIDIA H100": {"tensorrt": {"a": {"1": 0.5}}},
}


@pytest.mark.parametrize(
    ("device", "names", "expected"),
    [
        pytest.param("Big CPU, 8 threads", ["a"], ("openvino", "onnxruntime", "eager"), id="by-the-mean-over-batches"),
        pytest.param("Big CPU, 8 threads", ["b"], ("onnxruntime", "eager"), id="what-was-not-measured-is-left-out"),
        pytest.param("Small CPU, 2 threads", ["a"], ("openvino", "onnxruntime", "eager"), id="another-processor"),
        pytest.param("Small CPU (AVX512), 2 threads", ["a"], ("onnxruntime", "openvino"), id="one-of-its-vectors"),
        pytest.param("Other CPU (AVX512), 8 threads", ["a"], ("onnxruntime", "openvino"), id="its-other-threads"),
        pytest.param("Other CPU (AVX2), 4 threads", ["b"], ("onnxruntime", "eager"), id="another-has-the-candidate"),
        pytest.param("NVIDIA H100", ["a"], ("tensorrt",), id="a-gpu-by-its-own-times"),
        pytest.param("NVIDIA A100", ["a"], (), id="another-gpu-says-nothing"),
        pytest.param("Big CPU, 8 threads", ["c"], (), id="an-unmeasured-candidate"),
    ],
)
def test_engines_are_ranked_by_what_was_measured(device: str, names: list[str], expected: tuple[str, ...]) -> None:
    assert ranked_engines(TIMES, device, names) == expected


def test_the_fastest_engine_may_differ_by_batch_size() -> None:
    found = fastest(TIMES, "Big CPU, 8 threads", "a")
    assert found == {"1": ("onnxruntime", 4.0), "4": ("openvino", 3.0)}
    assert fastest(TIMES, "unknown", "a") == {}
    assert fastest(TIMES, "Big CPU, 8 threads", "a", "compiled")["4"] == ("compiled", 1.0)


def test_candidates_of_the_same_weights_get_the_same_engine() -> None:
    one = {"model": "m", "sampler": "ddim", "guidance_scale": 1.0}
    candidates = tuple(Candidate(name, steps=2, **one) for name in "ab")  # type: ignore[arg-type]
    catalog = Catalog(Path(), "some", candidates, milliseconds=TIMES)
    # Judged on the pairs that all three have: those of a.
    assert {catalog.engines_for(each, "Big CPU, 8 threads") for each in candidates} == {
        ("openvino", "onnxruntime", "eager")
    }
    own = dataclasses.replace(candidates[0], engine="eager")
    assert catalog.engines_for(own, "Big CPU, 8 threads") == ("eager",), "a candidate's own engine comes first"
    assert dataclasses.replace(catalog, milliseconds={}).engines_for(candidates[0], "x") == ("eager",)


def test_a_candidate_of_weights_never_timed_goes_by_those_of_its_precision() -> None:
    one = {"steps": 2, "sampler": "ddim", "guidance_scale": 1.0}
    candidates = (
        Candidate("a", "m", **one, precision="int8", quantization="q"),  # type: ignore[arg-type]
        Candidate("b", "m", **one),  # type: ignore[arg-type]
        Candidate("new", "m", **one, precision="int8", quantization="other"),  # type: ignore[arg-type]
        Candidate("newest", "m", **one, precision="bf16"),  # type: ignore[arg-type]
    )
    catalog = Catalog(Path(), "some", candidates, milliseconds=TIMES)
    assert catalog.engines_for(candidates[2], "Big CPU, 8 threads") == ("openvino", "onnxruntime", "eager")
    assert catalog.engines_for(candidates[3], "Big CPU, 8 threads") == ("eager",)


def test_costs_are_the_fastest_engines_milliseconds_at_the_largest_batch() -> None:
    one = {"sampler": "ddim", "guidance_scale": 1.0}
    candidates = tuple(Candidate(name, f"model-{name}", 2, **one) for name in "ab")  # type: ignore[arg-type]
    catalog = Catalog(
        Path(), "some", candidates, cost="milliseconds", cost_device="Big CPU, 8 threads", milliseconds=TIMES
    )
    assert catalog.costs == {"a": 3.0, "b": 15.0}
    assert catalog.cost_unit == "ms"
    missing = dataclasses.replace(catalog, cost_device="NVIDIA H100")
    with pytest.raises(ValueError, match=r"no milliseconds of NVIDIA H100 for b; measure them with `catimage eng"):
        _ = missing.costs
    with pytest.raises(ValueError, match="cost is 'milliseconds' and cost_device None"):
        dataclasses.replace(catalog, cost_device=None)


def test_an_engine_that_cannot_run_is_told_and_nothing_runs_in_its_place(tiny_catalog: Path) -> None:
    catalog = Catalog.load(tiny_catalog)
    catalog = dataclasses.replace(catalog, candidates=catalog.candidates[:1])
    tuned = tune_engines(catalog, ["eager", "tensorrt"], CPU, (1, 2), rounds=1)
    assert set(tuned.milliseconds) == {"eager"}
    assert set(tuned.milliseconds["eager"]["cheap-2"]) == {"1", "2"}
    assert set(tuned.skipped["tensorrt"]) == {"cheap-2"}
    saved = tuned_catalog(catalog, tuned, CPU)
    assert saved.costs == {"cheap-2": tuned.milliseconds["eager"]["cheap-2"]["2"]}


@pytest.fixture
def copied(tiny_catalog: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_catalog, tmp_path / "catalog")


def tune(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["engine", "tune", *map(str, arguments)])


def test_the_command_writes_times_by_which_routing_goes_on(copied: Path) -> None:
    done = tune(copied, "--engine", "eager", "--engine", "onnxruntime", "--batch", 1, "--batch", 2, "--rounds", 1)
    assert done.exit_code == 0, done.output
    assert "at batch 1 / 2" in " ".join(done.stdout.split())  # a processor's long name breaks the title's line
    catalog = Catalog.load(copied)  # checksums are those of the new files
    device = profiled_device(CPU)
    assert catalog.cost_device == device
    assert set(catalog.milliseconds[device]) == {"eager", "onnxruntime"}
    assert catalog.costs.keys() == {"cheap-2", "middle-3", "dear-4"}
    [route] = RoutedPipeline(catalog, "cpu").route("a dog", candidate="dear-4")
    assert route.cost == catalog.costs["dear-4"]


def test_the_command_prints_json(copied: Path) -> None:
    done = tune(copied, "--engine", "eager", "--batch", 1, "--rounds", 1, "--json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["candidate"] for row in rows} == {"cheap-2", "middle-3", "dear-4"}
    assert all(row["milliseconds"]["eager"]["1"] > 0 for row in rows)


def test_an_unknown_engine_is_refused_before_work(copied: Path) -> None:
    done = tune(copied, "--engine", "magic")
    assert done.exit_code == 2
    assert "engine is 'magic'; accepted: " in done.output
