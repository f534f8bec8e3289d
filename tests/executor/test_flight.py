"""Jobs that come, and are called off, while others are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from catimage_accel.catalog import Candidate
from catimage_accel.executor import Executor, Finished, Flight, Job, Step


def job(folder: Path, seed: int, steps: int = 4) -> Job:
    candidate = Candidate("one", str(folder), steps, "ddim", 2.0)
    return Job(f"{seed} dogs", candidate, torch.Generator().manual_seed(seed), key=seed)


def land(flight: Flight) -> dict[int, Finished]:
    outcomes = {}
    while not flight.idle:
        outcomes.update({outcome.key: outcome for outcome in flight.advance()})
    return outcomes


@pytest.fixture
def executor() -> Executor:
    return Executor(device="cpu", max_batch=2)


@pytest.fixture
def expected(executor: Executor, tiny_sd_folder: Path) -> dict[int, Finished]:
    return {key: next(executor.run([job(tiny_sd_folder, key)])) for key in range(4)}


def assert_same(outcome: Finished, expected: Finished) -> None:
    assert outcome.error is None
    torch.testing.assert_close(outcome.latents, expected.latents, atol=1e-5, rtol=1e-5)


def test_a_job_taken_later_joins_the_next_step(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished]
) -> None:
    seen: list[Step] = []
    flight = Flight(executor, seen.append)
    flight.take(job(tiny_sd_folder, 0))
    assert not list(flight.advance())
    flight.take(job(tiny_sd_folder, 1))
    outcomes = land(flight)
    assert [(step.job.key, step.index, step.batch) for step in seen[:3]] == [(0, 0, 1), (0, 1, 2), (1, 0, 2)]
    for key in (0, 1):
        assert_same(outcomes[key], expected[key])


@pytest.mark.parametrize("rounds", range(5), ids=["unencoded", "first-step", "mid-way", "mid-way-later", "last-step"])
def test_a_cancelled_job_costs_no_other_its_image(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished], rounds: int
) -> None:
    flight = Flight(executor)
    outcomes: dict[int, Finished] = {}
    for key in range(3):
        flight.take(job(tiny_sd_folder, key))
    for _ in range(rounds):
        outcomes.update({outcome.key: outcome for outcome in flight.advance()})
    finished_before = set(outcomes)
    flight.cancel(1)
    outcomes.update(land(flight))
    assert set(outcomes) == {0, 2} | (finished_before & {1})
    for key in (0, 2):
        assert_same(outcomes[key], expected[key])


def test_a_cancelled_jobs_slot_is_free_at_the_next_step(executor: Executor, tiny_sd_folder: Path) -> None:
    stepped: list[int] = []
    flight = Flight(executor, lambda step: stepped.append(step.job.key))
    for key in range(3):
        flight.take(job(tiny_sd_folder, key))
    assert flight.without_room == 1
    list(flight.advance())
    flight.cancel(0)
    assert flight.without_room == 0
    stepped.clear()
    list(flight.advance())
    assert sorted(stepped) == [1, 2]


def test_cancelling_the_last_job_leaves_the_flight_idle(executor: Executor, tiny_sd_folder: Path) -> None:
    flight = Flight(executor)
    flight.take(job(tiny_sd_folder, 0))
    flight.cancel(0)
    flight.cancel("never taken")
    assert flight.idle


def test_a_failed_take_comes_out_with_its_error(executor: Executor, tiny_sd_folder: Path) -> None:
    flight = Flight(executor)
    bad = Job("a dog", Candidate("bad", str(tiny_sd_folder / "nowhere"), 2, "ddim", 1.0), key="bad")
    flight.take(bad)
    flight.take(job(tiny_sd_folder, 0))
    outcomes = land(flight)
    assert outcomes["bad"].image is None
    assert outcomes["bad"].error is not None
    assert outcomes[0].error is None


def test_denoised_becomes_the_final_latents(executor: Executor, tiny_sd_folder: Path) -> None:
    steps: list[Step] = []
    last = next(executor.run([job(tiny_sd_folder, 0)], on_step=steps.append))
    errors = [float((step.denoised - last.latents).abs().mean()) for step in steps]
    # Not equal: without `set_alpha_to_one` DDIM's last step leaves a little of the noise.
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
    assert all(step.denoised.shape == step.latents.shape for step in steps)


def test_the_batch_that_fits_is_remembered(
    executor: Executor, tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = executor.prepare(job(tiny_sd_folder, 0).candidate)
    real, failures = engine.denoise, []

    def one_only(sample: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if len(sample) > 2:
            failures.append(len(sample))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(sample, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "denoise", one_only)
    for _ in range(2):
        outcomes = list(executor.run([job(tiny_sd_folder, key) for key in range(3)]))
        assert all(isinstance(outcome.image, np.ndarray) for outcome in outcomes)
    assert failures == [4]
