"""What goes wrong with one job stays with that job."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from catimage_accel.catalog import Candidate
from catimage_accel.executor import Executor, Finished, Job

BAD_SEED = 2


def candidate(folder: Path, **more: Any) -> Candidate:
    return Candidate(**{
        "name": "one", "model": str(folder), "steps": 3, "sampler": "ddim", "guidance_scale": 2.0, **more,
    })  # fmt: skip


def unchecked(folder: Path, **more: Any) -> Candidate:
    """A candidate that the catalog would refuse: the executor checks for itself."""
    made = candidate(folder)
    for name, value in more.items():
        object.__setattr__(made, name, value)
    return made


def jobs(folder: Path, count: int = 5) -> list[Job]:
    return [Job("a dog", candidate(folder), torch.Generator().manual_seed(k), key=k) for k in range(count)]


def by_key(outcomes: Any) -> dict[int, Finished]:
    return {outcome.key: outcome for outcome in outcomes}


@pytest.fixture
def executor() -> Executor:
    return Executor(device="cpu", max_batch=8)


@pytest.fixture
def expected(tiny_sd_folder: Path) -> dict[int, Finished]:
    return by_key(Executor(device="cpu").run(jobs(tiny_sd_folder)))


def assert_only_the_bad_one_failed(outcomes: dict[int, Finished], expected: dict[int, Finished], message: str) -> None:
    assert outcomes.keys() == expected.keys()
    for key, outcome in outcomes.items():
        if key == BAD_SEED:
            assert message in str(outcome.error)
            assert outcome.image is None
        else:
            assert outcome.error is None
            torch.testing.assert_close(outcome.latents, expected[key].latents, atol=1e-5, rtol=1e-5)
            assert outcome.image is not None


def break_on(engine: Any, method: str, is_bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one of the engine's calls raise whenever its first argument holds the bad image."""
    real = getattr(engine, method)

    def broken(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(is_bad(row) for row in first):
            raise RuntimeError(f"{method} broke")
        return real(first, *args, **kwargs)

    monkeypatch.setattr(engine, method, broken)


def test_decode_of_one_fails(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = executor.prepare(candidate(tiny_sd_folder))
    bad = expected[BAD_SEED].latents
    break_on(engine, "decode", lambda row: torch.allclose(row, bad, atol=1e-4), monkeypatch)
    outcomes = by_key(executor.run(jobs(tiny_sd_folder)))
    assert_only_the_bad_one_failed(outcomes, expected, "decode broke")
    torch.testing.assert_close(outcomes[BAD_SEED].latents, bad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_step", [0, 1, 2])
def test_a_step_of_one_fails(
    executor: Executor,
    tiny_sd_folder: Path,
    expected: dict[int, Finished],
    monkeypatch: pytest.MonkeyPatch,
    at_step: int,
) -> None:
    engine, _ = executor.prepare(candidate(tiny_sd_folder))
    samples = {-1: torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(BAD_SEED))}

    def record(step: Any) -> None:
        samples[step.index] = step.latents

    list(Executor(device="cpu").run([jobs(tiny_sd_folder)[BAD_SEED]], on_step=record))
    bad = samples[at_step - 1]
    break_on(engine, "denoise", lambda row: torch.allclose(row, bad, atol=1e-4), monkeypatch)
    assert_only_the_bad_one_failed(by_key(executor.run(jobs(tiny_sd_folder))), expected, "denoise broke")


def test_a_batch_too_large_is_halved(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = executor.prepare(candidate(tiny_sd_folder))
    real, sizes = engine.denoise, []

    def small_only(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(sample))
        if len(sample) > 4:
            raise MemoryError("too many rows")
        return real(sample, *args, **kwargs)

    monkeypatch.setattr(engine, "denoise", small_only)
    outcomes = by_key(executor.run(jobs(tiny_sd_folder)))
    assert all(outcome.error is None for outcome in outcomes.values())
    for key, outcome in outcomes.items():
        torch.testing.assert_close(outcome.latents, expected[key].latents, atol=1e-5, rtol=1e-5)
    assert sum(size > 4 for size in sizes) == 1, "asked for too much only once"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param({"prompt": 3}, "prompt is 3; accepted: a string", id="prompt is no string"),
        pytest.param({"height": 65}, "height is 65; accepted: a positive multiple of 4", id="height"),
        pytest.param({"width": 0}, "width is 0; accepted: a positive multiple of 4", id="width"),
        pytest.param({"latents": torch.zeros(3, 16, 16)}, "latents have shape (3, 16, 16)", id="latents"),
    ],
)
def test_a_bad_job(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished], bad: dict[str, Any], message: str
) -> None:
    stream = jobs(tiny_sd_folder)
    stream[BAD_SEED] = Job(**{"prompt": "a dog", "candidate": candidate(tiny_sd_folder), "key": BAD_SEED, **bad})
    assert_only_the_bad_one_failed(by_key(executor.run(stream)), expected, message)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        pytest.param({"sampler": "plms"}, ValueError, "sampler is 'plms'", id="sampler"),
        pytest.param({"precision": "int4"}, ValueError, "precision is 'int4'", id="precision"),
        pytest.param({"precision": "fp16"}, ValueError, "precision is 'fp16' on device 'cpu'", id="fp16 on a CPU"),
        pytest.param({"engine": "magic"}, ValueError, "engine is 'magic'; accepted: eager", id="engine"),
        pytest.param({"steps": 0}, ValueError, "steps is 0", id="no steps"),
        pytest.param({"steps": 1001}, ValueError, "steps is 1001; accepted: 1 to 1000", id="too many steps"),
        pytest.param({"guidance_scale": float("nan")}, ValueError, "guidance_scale is nan", id="guidance"),
        pytest.param({"options": {"deepcache": 2}}, ValueError, "option is 'deepcache'", id="option"),
        pytest.param({"options": {"deepcache_interval": 0}}, ValueError, "deepcache_interval is 0", id="interval"),
        pytest.param({"unet": "unet_small"}, FileNotFoundError, "unet_small", id="UNet folder"),
        pytest.param({"vae": "vae_small"}, FileNotFoundError, "vae_small", id="VAE folder"),
        pytest.param({"model": "/nowhere"}, FileNotFoundError, "/nowhere is not a folder", id="model folder"),
    ],
)
def test_bad_candidates_are_known_before_work(
    executor: Executor, tiny_sd_folder: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    bad = unchecked(tiny_sd_folder, **fields)
    with pytest.raises(error, match=message):
        executor.check(bad)
    [outcome] = executor.run([Job("a dog", bad)])
    assert type(outcome.error) is error
    assert message in str(outcome.error)


def test_a_truncated_weights_file_fails_its_jobs_only(
    executor: Executor, tiny_sd_folder: Path, expected: dict[int, Finished], tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_sd_folder, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    stream = jobs(tiny_sd_folder)
    stream[BAD_SEED] = Job("a dog", candidate(broken), key=BAD_SEED)
    outcomes = by_key(executor.run(stream))
    assert_only_the_bad_one_failed(outcomes, expected, str(weights))


def test_jobs_that_stop_with_an_error(executor: Executor, tiny_sd_folder: Path) -> None:
    """What was taken on is drawn; the error comes after it."""

    def stream() -> Iterator[Job]:
        yield from jobs(tiny_sd_folder, 3)
        raise OSError("the prompt file went away")

    run = executor.run(stream())
    outcomes = [next(run) for _ in range(3)]
    with pytest.raises(OSError, match="the prompt file went away"):
        next(run)
    assert sorted(outcome.key for outcome in outcomes) == [0, 1, 2]
    assert all(outcome.image is not None for outcome in outcomes)


def test_what_on_step_raises_is_raised(executor: Executor, tiny_sd_folder: Path) -> None:
    def on_step(step: Any) -> None:
        raise ZeroDivisionError("from the caller")

    with pytest.raises(ZeroDivisionError, match="from the caller"):
        list(executor.run(jobs(tiny_sd_folder), on_step=on_step))
