"""A reproducible executor: the same bits, whatever is drawn beside an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel.catalog import Candidate
from catimage_accel.executor import Executor, Finished, Job

PROMPTS = ("a dog", "a crown, a dog and a bear on a pink background", "three lemons", "")


def candidates(folder: Path, engine: str) -> list[Candidate]:
    return [
        Candidate("plain", str(folder), 3, "ddim", 3.0, engine=engine),
        Candidate("unguided", str(folder), 2, "euler", 1.0, engine=engine),
        Candidate("cached", str(folder), 5, "dpmsolver++", 2.0, engine=engine, options={"deepcache_interval": 2}),
    ]


def job(folder: Path, engine: str, key: int) -> Job:
    candidate = candidates(folder, engine)[key % 3]
    return Job(PROMPTS[key % 4], candidate, torch.Generator().manual_seed(key), key=key)


@pytest.fixture(scope="module")
def executors() -> dict[str, Executor]:
    return {name: Executor(device="cpu", max_batch=5, reproducible=True) for name in ("eager", "openvino")}


@pytest.fixture(scope="module")
def alone(executors: dict[str, Executor], tiny_sd_folder: Path) -> dict[tuple[str, int], Finished]:
    return {
        (engine, key): next(executor.run([job(tiny_sd_folder, engine, key)]))
        for engine, executor in executors.items()
        for key in range(12)
    }


@pytest.mark.parametrize("engine", ["eager", "openvino"])
@given(order=st.permutations(range(12)), data=st.data())
@settings(max_examples=10, deadline=None)
def test_bits_do_not_depend_on_the_company(
    executors: dict[str, Executor], alone: dict[tuple[str, int], Finished], tiny_sd_folder: Path, engine: str,
    order: list[int], data: Any,
) -> None:  # fmt: skip
    keys = order[: data.draw(st.integers(2, 12))]
    for outcome in executors[engine].run(job(tiny_sd_folder, engine, key) for key in keys):
        expected = alone[engine, outcome.key]
        assert outcome.latents is not None
        assert expected.latents is not None
        assert torch.equal(outcome.latents, expected.latents)
        assert outcome.image is not None
        assert np.array_equal(outcome.image, expected.image)


def test_pictures_are_those_of_batches_up_to_rounding(
    alone: dict[tuple[str, int], Finished], tiny_sd_folder: Path
) -> None:
    jobs = [job(tiny_sd_folder, "eager", key) for key in range(12)]
    for outcome in Executor(device="cpu").run(jobs):
        torch.testing.assert_close(outcome.latents, alone["eager", outcome.key].latents, atol=1e-4, rtol=1e-4)
