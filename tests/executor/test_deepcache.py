"""DeepCache against diffusers' pipeline with the input of the last up block held between refreshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from catimage_accel.catalog import Candidate
from catimage_accel.executor import Executor, Job


def job(folder: Path, seed: int, steps: int, guidance: float, interval: int | None) -> Job:
    options = {} if interval is None else {"deepcache_interval": interval}
    drawn_by = Candidate("cached", str(folder), steps, "ddim", guidance, options=options)
    return Job("a crown and a dog", drawn_by, torch.Generator().manual_seed(seed), key=seed)


def draw(executor: Executor, jobs: list[Job]) -> dict[int, torch.Tensor]:
    outcomes = list(executor.run(jobs))
    assert [outcome.error for outcome in outcomes] == [None] * len(jobs)
    return {outcome.key: outcome.latents for outcome in outcomes}


def with_diffusers(folder: Path, one: Job) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    interval = one.candidate.options.get("deepcache_interval", 1)
    calls: list[torch.Tensor] = []

    def hold(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        whole = len(calls) % interval == 0 or len(calls) == one.candidate.steps - 1
        calls.append(output if whole else calls[-1])
        return calls[-1]

    pipe.unet.up_blocks[-2].register_forward_hook(hold)
    return pipe(
        one.prompt, num_inference_steps=one.candidate.steps, guidance_scale=one.candidate.guidance_scale,
        output_type="latent", generator=torch.Generator().manual_seed(one.key),
    ).images[0]  # fmt: skip


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(device="cpu", max_batch=3)


@pytest.mark.parametrize(
    ("guidance", "interval"),
    [
        pytest.param(3.0, 1, id="every step, as without"),
        pytest.param(3.0, 3, id="guided"),
        pytest.param(1.0, 2, id="no guidance"),
        pytest.param(3.0, 4, id="the last step is no refresh by counting"),
        pytest.param(3.0, 50, id="whole at the first step and the last only"),
    ],
)
def test_alone(executor: Executor, tiny_sd_folder: Path, guidance: float, interval: int) -> None:
    one = job(tiny_sd_folder, 1, 7, guidance, interval)
    latents = draw(executor, [one])[1]
    torch.testing.assert_close(latents, with_diffusers(tiny_sd_folder, one), atol=1e-3, rtol=0)


def test_features_matter(executor: Executor, tiny_sd_folder: Path) -> None:
    """Guards the other tests: if holding the features changed nothing, they would prove nothing."""
    plain, held = (draw(executor, [job(tiny_sd_folder, 1, 7, 3.0, interval)])[1] for interval in (None, 7))
    assert (plain - held).abs().max() > 0.05


def test_in_a_mixed_batch(executor: Executor, tiny_sd_folder: Path) -> None:
    """Slots at a refresh, between two, and without DeepCache share steps; each keeps its own features as others go."""
    mix = [(7, 3.0, 3), (4, 1.0, 2), (5, 2.0, None), (9, 1.0, 4), (6, 3.0, 2), (3, 1.0, None), (8, 5.0, 3)]
    jobs = [job(tiny_sd_folder, seed, *rest) for seed, rest in enumerate(mix)]
    latents = draw(executor, jobs)
    for one in jobs:
        expected = with_diffusers(tiny_sd_folder, one)
        torch.testing.assert_close(latents[one.key], expected, atol=1e-3, rtol=0)


def test_deep_blocks_run_at_refreshes_only(executor: Executor, tiny_sd_folder: Path) -> None:
    one = job(tiny_sd_folder, 1, 6, 3.0, 3)
    engine, _ = executor.prepare(one.candidate)
    rows: list[int] = []
    handle = engine.unet.mid_block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))  # type: ignore[attr-defined]
    try:
        draw(executor, [one, job(tiny_sd_folder, 2, 7, 1.0, 2)])
    finally:
        handle.remove()
    # Steps 0, 3 and 5, its last, refresh the guided image's two rows, steps 0, 2, 4, 6 the other's one.
    assert rows == [3, 1, 2, 1, 2, 1]
