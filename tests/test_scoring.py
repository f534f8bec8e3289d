"""Scores that survive interruption: nothing is drawn twice for them, and nothing that was written is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from catimage_accel import Catalog
from catimage_accel.executor import Executor, Finished, Job
from catimage_accel.profiling import profiled_device
from catimage_accel.quantize import LayerQuantization, Quantization, weights_sha256
from catimage_accel.scoring import image_seed, score_candidates

PROMPTS = ["a dog", "a cat", "a bee", "a dog"]


class Brightness:
    """A metric that needs no model, and can be interrupted."""

    name, higher_is_better, range = "brightness", True, (0.0, 255.0)

    def __init__(self, batches: int = 1000) -> None:
        self.left = batches
        self.seen = 0

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += len(images)
        return np.array([image.mean() for image in images])


class Redness(Brightness):
    """A second metric."""

    name = "redness"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        super().score(images, prompts)
        return np.array([image[..., 0].mean() for image in images])


class Interrupted(Executor):
    """An executor that is stopped, or fails with one job, after ``images`` images."""

    def __init__(self, images: int, error: BaseException, **options: Any) -> None:
        super().__init__(**options)
        self.left, self.error = images, error

    def run(self, jobs: Iterable[Job], **options: Any) -> Iterator[Finished]:
        for finished in super().run(jobs, **options):
            self.left -= 1
            if self.left == -1:
                if not isinstance(self.error, Exception):
                    raise self.error
                finished = dataclasses.replace(finished, image=None, error=self.error)
            yield finished


def scored(
    folder: Path, *metrics: Brightness, seeds: Sequence[int] = (0,), stop: tuple[int, BaseException] | None = None,
    **options: Any,
) -> int:  # fmt: skip
    catalog = Catalog.load(folder, verify=False)
    executor = (
        Executor(resolve_model=catalog.resolve_model)
        if stop is None
        else Interrupted(*stop, resolve_model=catalog.resolve_model)
    )
    return score_candidates(catalog, executor, metrics, PROMPTS, seeds, chunk=2, **options)


@pytest.fixture
def bare(tiny_catalog: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    (folder / "quality.parquet").unlink()
    return folder


def table(folder: Path, metric: str = "brightness") -> dict[tuple[str, str, int], float]:
    rows = pyarrow.parquet.read_table(folder / "quality.parquet").to_pylist()
    found = [(row["prompt"], row["candidate"], row["seed"], row["metric"], row["score"]) for row in rows]
    assert len({row[:4] for row in found}) == len(found)
    return {row[:3]: row[4] for row in found if row[3] == metric}


def test_an_interrupted_profile_goes_on_where_it_was(bare: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(bare, tmp_path / "whole"))
    assert scored(whole, Brightness()) == 9
    with pytest.raises(KeyboardInterrupt):
        scored(bare, Brightness(batches=1))
    assert len(table(bare)) == 6
    assert scored(bare, Brightness()) == 3
    assert table(bare) == pytest.approx(table(whole), abs=0.1)
    assert scored(bare, Brightness(batches=0)) == 0
    assert not list(bare.glob(".*"))


@pytest.mark.parametrize(
    ("brightness", "redness", "images", "kept"),
    [
        pytest.param(0, 0, None, (0, 0), id="in-the-first-score"),
        pytest.param(1, 0, None, (6, 0), id="between-two-metrics-of-a-chunk"),
        pytest.param(1, 1, None, (6, 6), id="in-the-second-chunks-score"),
        pytest.param(9, 9, 0, (0, 0), id="before-the-first-image"),
        pytest.param(9, 9, 8, (6, 6), id="while-drawing-the-second-chunk"),
    ],
)
def test_several_metrics_stopped_anywhere_end_as_if_never_stopped(
    bare: Path, tmp_path: Path, brightness: int, redness: int, images: int | None, kept: tuple[int, int]
) -> None:
    whole = Path(shutil.copytree(bare, tmp_path / "whole"))
    assert scored(whole, Brightness(), Redness()) == 18
    stop = None if images is None else (images, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        scored(bare, Brightness(brightness), Redness(redness), stop=stop)
    written = (bare / "quality.parquet").exists()
    found = tuple(len(table(bare, name)) if written else 0 for name in ("brightness", "redness"))
    assert found == kept
    first, second = Brightness(), Redness()
    assert scored(bare, first, second) == 18 - sum(kept)
    assert (first.seen, second.seen) == (9 - kept[0], 9 - kept[1]), "no score is made twice"
    for name in ("brightness", "redness"):
        assert table(bare, name) == pytest.approx(table(whole, name), abs=0.1)


def test_an_image_is_drawn_once_for_all_metrics(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Job] = []
    run = Executor.run

    def counting(self: Executor, jobs: Iterable[Job]) -> Iterator[Finished]:
        for finished in run(self, jobs):
            drawn.append(finished.job)
            yield finished

    monkeypatch.setattr(Executor, "run", counting)
    told: list[int] = []
    assert scored(bare, Brightness(), Redness(), advance=told.append) == 18
    assert (len(drawn), sum(told)) == (9, 9)
    told.clear()
    assert scored(bare, Brightness(), Redness(), advance=told.append) == 0
    assert (len(drawn), sum(told)) == (9, 9)


def test_an_image_that_fails_costs_no_other_its_score(bare: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory"):
        scored(bare, Brightness(), stop=(2, RuntimeError("no memory")))
    assert len(table(bare)) == 5
    assert scored(bare, Brightness()) == 4


def test_every_candidate_draws_a_prompt_with_the_same_seed(bare: Path) -> None:
    assert scored(bare, Brightness(), seeds=(0, 1)) == 18
    expected = {image_seed(seed, prompt) for seed in (0, 1) for prompt in ("a dog", "a cat", "a bee")}
    assert len(expected) == 6
    for name in ("cheap-2", "middle-3", "dear-4"):
        assert {seed for _, candidate, seed in table(bare) if candidate == name} == expected


def test_every_seed_draws_another_picture(bare: Path) -> None:
    """torch's generator takes no notice of the upper half of a seed."""
    scored(bare, Brightness(), seeds=range(3))
    found = table(bare)
    assert len(found) == 3 * 3 * 3
    assert len({round(score, 6) for score in found.values()}) == len(found)


def test_scores_of_a_changed_candidate_are_drawn_again(bare: Path) -> None:
    scored(bare, Brightness())
    path = bare / "catalog.toml"
    path.write_text(path.read_text().replace("steps = 4", "steps = 3"))
    before = table(bare)
    assert scored(bare, Brightness()) == 3
    changed = {name for key, score in table(bare).items() if score != before[key] for name in [key[1]]}
    assert changed == {"dear-4"}


@pytest.mark.parametrize(
    "field",
    [
        pytest.param('vae = "vae_small"', id="another-decoder"),
        pytest.param("guidance_rescale = 0.7", id="rescaled-guidance"),
    ],
)
def test_scores_with_a_later_field_are_drawn_again_and_those_of_older_files_kept(bare: Path, field: str) -> None:
    scored(bare, Brightness())
    definitions = json.loads(pyarrow.parquet.read_schema(bare / "quality.parquet").metadata[b"candidates"])
    name = field.split(" ")[0]
    assert not any(name in fields for fields in definitions.values()), "as in files written before there was a choice"
    path = bare / "catalog.toml"
    shutil.copytree(bare / "model" / "vae", bare / "model" / "vae_small")
    path.write_text(path.read_text().replace("steps = 4", f"steps = 4\n{field}"))
    assert scored(bare, Brightness()) == 3
    assert scored(bare, Brightness()) == 0


def test_another_engine_draws_the_same_picture(bare: Path) -> None:
    scored(bare, Brightness())
    path = bare / "catalog.toml"
    path.write_text(path.read_text().replace('engine = "auto"', 'engine = "eager"'))
    assert {candidate.engine for candidate in Catalog.load(bare, verify=False).candidates} == {"eager"}
    assert scored(bare, Brightness()) == 0


def test_scores_of_another_quantization_in_the_same_folder_are_drawn_again(bare: Path) -> None:
    catalog = Catalog.load(bare, verify=False)
    low = dataclasses.replace(catalog.candidates[0], name="low", precision="int8", quantization="quantized/some")

    def quantize(largest: float) -> None:
        one = LayerQuantization(torch.ones(16), torch.tensor(largest), None, None)
        digest = weights_sha256(bare / "model")
        Quantization("int8", "int8", {"conv_in": one}, {}, digest, {}, {}).save(bare / "quantized" / "some")

    quantize(4.0)
    dataclasses.replace(catalog, candidates=(*catalog.candidates, low), flops={}, milliseconds={}).save(bare)
    assert scored(bare, Brightness()) == 12
    before = table(bare)
    quantize(1.0)
    assert scored(bare, Brightness()) == 3
    assert {key[1] for key, score in table(bare).items() if score != before[key]} == {"low"}


def test_scores_of_weights_that_were_trained_on_are_drawn_again(bare: Path) -> None:
    scored(bare, Brightness())
    path = bare / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: value * 1.5 for name, value in weights.items()}, path)
    before = table(bare)
    assert scored(bare, Brightness()) == 9
    assert table(bare) != before


def test_scores_of_a_file_that_does_not_tell_the_weights_are_kept(bare: Path) -> None:
    scored(bare, Brightness())
    path = bare / "quality.parquet"
    stored = pyarrow.parquet.read_table(path)
    told = json.loads(stored.schema.metadata[b"candidates"])
    for fields in told.values():
        del fields["weights"]
    metadata = stored.schema.metadata | {b"candidates": json.dumps(told).encode()}
    pyarrow.parquet.write_table(stored.replace_schema_metadata(metadata), path)
    assert scored(bare, Brightness()) == 0


def test_rows_of_a_candidate_that_is_out_of_the_catalog_for_a_while_are_kept(bare: Path) -> None:
    scored(bare, Brightness())
    whole, before = (bare / "catalog.toml").read_text(), table(bare)
    catalog = Catalog.load(bare, verify=False)
    dataclasses.replace(catalog, candidates=catalog.candidates[1:], flops={}, milliseconds={}).save(bare)
    assert scored(bare, Redness()) == 6
    (bare / "catalog.toml").write_text(whole)
    assert scored(bare, Brightness()) == 0
    assert before.items() <= table(bare).items()


def test_other_metrics_rows_stay(bare: Path, tiny_catalog: Path) -> None:
    shutil.copy(tiny_catalog / "quality.parquet", bare)
    scored(bare, Brightness())
    assert len(Catalog.load(bare, verify=False).quality_table()) == 14
    before = table(bare)
    assert scored(bare, Redness()) == 9
    assert table(bare) == before


class Judged(Brightness):
    """A metric with a model."""

    name = "judged"

    def __init__(self, digest: str) -> None:
        super().__init__()
        self.digest = digest


def test_scores_of_two_models_do_not_mix(bare: Path) -> None:
    first, second = Judged("one"), Judged("another")
    with pytest.raises(KeyboardInterrupt):
        scored(bare, first, Brightness(batches=0))
    assert scored(bare, Brightness()) == 9, "a run without the metric keeps what its scores came from"
    before = (bare / "quality.parquet").read_bytes()
    with pytest.raises(ValueError, match="judged by another model, of digest one, not another"):
        scored(bare, second, stop=(0, AssertionError("nothing is to be drawn")))
    assert (bare / "quality.parquet").read_bytes() == before
    assert scored(bare, first) == 3


def test_the_time_is_estimated_from_costs_before_anything_is_drawn(bare: Path) -> None:
    catalog = Catalog.load(bare, verify=False)
    executor = Executor(resolve_model=catalog.resolve_model, max_batch=8)
    # Batch 4 is the largest that max_batch allows.
    times = {name: {"1": 9000.0, "4": 1000.0 * (i + 1), "16": 1.0} for i, name in enumerate(catalog.flops)}
    catalog = dataclasses.replace(catalog, milliseconds={profiled_device(executor.device): {"eager": times}})
    told: list[tuple[int, float | None]] = []

    def estimate(images: int, seconds: float | None) -> None:
        told.append((images, seconds))
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score_candidates(catalog, executor, [Brightness()], PROMPTS, chunk=2, estimate=estimate)  # type: ignore[list-item]
    assert told == [(9, pytest.approx(3 * (1 + 2 + 3)))] * 2
    assert not (bare / "quality.parquet").exists()


def test_without_times_of_the_device_the_first_chunk_tells(bare: Path) -> None:
    told: list[tuple[int, float | None]] = []
    scored(bare, Brightness(), estimate=lambda images, seconds: told.append((images, seconds)))
    (before, after) = told
    assert before == (9, None)
    assert after[0] == 3
    assert after[1] is not None
    assert 0 < after[1] < 60
    told.clear()
    scored(bare, Brightness(), estimate=lambda images, seconds: told.append((images, seconds)))
    assert told == [], "nothing is left to draw"


@pytest.mark.parametrize(
    "metrics", [pytest.param([], id="none"), pytest.param([Brightness(), Brightness()], id="one-twice")]
)
def test_metrics_must_differ(bare: Path, metrics: list[Brightness]) -> None:
    with pytest.raises(ValueError, match=r"metrics are \[.*\]; accepted: at least 1, each once"):
        scored(bare, *metrics)
