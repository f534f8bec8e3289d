"""The executor against diffusers' own pipeline, alone and in mixed batches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import SCHEDULERS

from catimage_accel.catalog import Candidate
from catimage_accel.executor import Executor, Finished, Job, Step

PROMPTS = ("a dog", "a crown, a dog and a bear on a pink background", "three lemons", "")


def candidate(folder: Path, sampler: str = "ddim", steps: int = 4, guidance: float = 3.0, **more: Any) -> Candidate:
    return Candidate(
        name="one", model=str(folder), steps=steps, sampler=sampler, guidance_scale=guidance, **more
    )  # fmt: skip


def job(drawn_by: Candidate, prompt: str, seed: int) -> Job:
    return Job(prompt, drawn_by, torch.Generator().manual_seed(seed), key=seed)


def finished(executor: Executor, jobs: list[Job]) -> list[Finished]:
    """The outcomes in the order of the jobs, whose keys are distinct."""
    outcomes = {outcome.key: outcome for outcome in executor.run(jobs)}
    assert len(outcomes) == len(jobs)
    for outcome in outcomes.values():
        if outcome.error is not None:
            raise outcome.error
    return [outcomes[one.key] for one in jobs]


@pytest.fixture(scope="module")
def pipe(tiny_sd_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(device="cpu", max_batch=5)


def with_diffusers(pipe: StableDiffusionPipeline, one: Job, output_type: str = "latent") -> Any:
    c = one.candidate
    own = pipe.scheduler
    spacing = {} if c.timestep_spacing is None else {"timestep_spacing": c.timestep_spacing}
    pipe.scheduler = SCHEDULERS[c.sampler].from_config(own.config, **spacing)
    try:
        return pipe(
            one.prompt, num_inference_steps=c.steps, guidance_scale=c.guidance_scale,
            guidance_rescale=c.guidance_rescale, output_type=output_type,
            generator=torch.Generator().manual_seed(one.key),
        ).images[0]  # fmt: skip
    finally:
        pipe.scheduler = own


def assert_as_diffusers(pipe: StableDiffusionPipeline, outcome: Finished) -> None:
    assert outcome.latents is not None
    torch.testing.assert_close(outcome.latents, with_diffusers(pipe, outcome.job), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
@pytest.mark.parametrize(
    ("steps", "guidance"),
    [
        pytest.param(1, 3.0, id="a single step"),
        pytest.param(6, 7.5, id="guidance"),
        pytest.param(6, 1.0, id="scale 1 means no guidance"),
        pytest.param(16, 0.0, id="no guidance, DPM-Solver++ without a lower last order"),
    ],
)
def test_latents_alone(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path, sampler: str, steps: int, guidance: float
) -> None:
    [outcome] = finished(executor, [job(candidate(tiny_sd_folder, sampler, steps, guidance), PROMPTS[1], 5)])
    assert_as_diffusers(pipe, outcome)


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
def test_rescaled_guidance_in_one_batch_with_others(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path, sampler: str
) -> None:
    mix = [(7.5, 0.7), (7.5, 0.0), (3.0, 1.0), (1.0, 0.7)]  # a scale of 1 is no guidance, and nothing to rescale
    jobs = [
        job(candidate(tiny_sd_folder, sampler, 4, guidance, guidance_rescale=rescale), PROMPTS[0], index)
        for index, (guidance, rescale) in enumerate(mix)
    ]
    for outcome in finished(executor, jobs):
        assert_as_diffusers(pipe, outcome)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_candidates_own_timestep_spacing(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path, spacing: str
) -> None:
    spaced = [candidate(tiny_sd_folder, one, 4, timestep_spacing=spacing) for one in ("euler_ancestral", "ddim")]
    jobs = [job(one, PROMPTS[0], index) for index, one in enumerate([*spaced, candidate(tiny_sd_folder, "ddim", 4)])]
    outcomes = finished(executor, jobs)
    for outcome in outcomes:
        assert_as_diffusers(pipe, outcome)
    assert outcomes[1].latents is not None
    assert outcomes[2].latents is not None
    assert not torch.allclose(outcomes[1].latents, outcomes[2].latents, atol=1e-2), "the spacing changes the picture"


def mixed_jobs(folder: Path) -> list[Job]:
    """More jobs than places, so that they join and leave; every sampler, several lengths, guided and not."""
    mix = [("ddim", 7, 3.0), ("euler", 4, 1.0), ("dpmsolver++", 9, 7.5), ("ddim", 2, 1.0), ("euler", 11, 2.0)]
    mix += [("dpmsolver++", 16, 1.0), ("dpmsolver++", 3, 4.0), ("ddim", 1, 5.0), ("lcm", 4, 1.0), ("lcm", 6, 2.0)]
    mix += [("euler_ancestral", 5, 3.0), ("dpmsolver++", 5, 3.0), ("euler_ancestral", 1, 1.0)]
    return [
        job(candidate(folder, sampler, steps, guidance), PROMPTS[index % 4], index)
        for index, (sampler, steps, guidance) in enumerate(mix)
    ]


def test_latents_and_image_in_a_mixed_batch(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path
) -> None:
    for outcome in finished(executor, mixed_jobs(tiny_sd_folder)):
        assert_as_diffusers(pipe, outcome)
        expected = with_diffusers(pipe, outcome.job, "np")
        assert outcome.image is not None
        assert outcome.image.dtype == np.uint8
        assert outcome.image.shape == (64, 64, 3)
        assert np.abs(outcome.image - expected * 255).max() < 1.0
        assert outcome.milliseconds > 0


@cache
def executor_of(max_batch: int) -> Executor:
    return Executor(device="cpu", max_batch=max_batch)


@settings(max_examples=10, deadline=None)
@given(
    mix=st.lists(
        st.tuples(
            st.sampled_from(sorted(SCHEDULERS)), st.integers(1, 6), st.sampled_from([1.0, 3.0]),
            st.sampled_from([1, 2, 3]), st.sampled_from([None, 96]),
        ), min_size=2, max_size=9,
    ),
    max_batch=st.integers(1, 5),
)  # fmt: skip
def test_an_image_does_not_depend_on_the_batch(
    tiny_sd_folder: Path, mix: list[tuple[Any, ...]], max_batch: int
) -> None:
    """Any mixture of samplers, lengths, guidance, DeepCache and sizes, in batches of any limit."""

    def one(seed: int) -> Job:
        sampler, steps, guidance, interval, width = mix[seed]
        drawn_by = candidate(tiny_sd_folder, sampler, steps, guidance, options={"deepcache_interval": interval})
        generator = torch.Generator().manual_seed(seed)
        return Job(PROMPTS[seed % 4], drawn_by, generator, key=seed, width=width)

    executor = executor_of(max_batch)
    together = finished(executor, [one(seed) for seed in range(len(mix))])
    for seed, outcome in enumerate(together):
        [alone] = finished(executor, [one(seed)])
        torch.testing.assert_close(outcome.latents, alone.latents, atol=1e-5, rtol=1e-5)


def test_a_shared_generator_is_drawn_from_in_the_order_of_the_jobs(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    one = candidate(tiny_sd_folder)
    jobs = [Job("a dog", one, generator, key=key) for key in range(2)]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        "a dog", num_inference_steps=4, guidance_scale=3.0, output_type="latent", num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    for outcome, latents in zip(finished(executor, jobs), expected, strict=True):
        torch.testing.assert_close(outcome.latents, latents, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
def test_old_scheduler_configs_are_read_as_the_pipeline_reads_them(
    executor: Executor, tiny_sd_folder: Path, tmp_path: Path, sampler: str
) -> None:
    """steps_offset 0 and clip_sample, which StableDiffusionPipeline corrects; predicts epsilon, with leading steps."""
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "old")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"steps_offset": 0, "timestep_spacing": "leading", "prediction_type": "epsilon", "clip_sample": True}
    path.write_text(json.dumps(config))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert_as_diffusers(pipe, finished(executor, [job(candidate(folder, sampler, 6), "a dog", 1)])[0])


@pytest.mark.parametrize("size", [pytest.param((96, 64), id="tall"), pytest.param((36, 44), id="odd latents")])
def test_other_sizes_share_the_run(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path, size: tuple[int, int]
) -> None:
    height, width = size
    own = Job("a dog", candidate(tiny_sd_folder), torch.Generator().manual_seed(1), key=1, height=height, width=width)
    outcome, other = finished(executor, [own, job(candidate(tiny_sd_folder), "a dog", 2)])
    assert outcome.image is not None
    assert outcome.image.shape == (height, width, 3)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn((1, 4, height // 4, width // 4), generator=torch.Generator().manual_seed(1))
    scheduler = pipe.scheduler
    expected = pipe.unet  # the pipeline only takes multiples of 8, so the loop is written out
    states = torch.cat(pipe.encode_prompt("a dog", "cpu", 1, True)[::-1])
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            uncond, cond = expected(torch.cat([noise, noise]), timestep, states).sample.chunk(2)
            noise = scheduler.step(uncond + 3.0 * (cond - uncond), timestep, noise).prev_sample
    torch.testing.assert_close(outcome.latents, noise[0], atol=1e-3, rtol=0)
    assert_as_diffusers(pipe, other)


def test_given_latents_are_the_noise(executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path) -> None:
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(9))
    own = Job("a dog", candidate(tiny_sd_folder, "euler"), latents=noise, key=9)
    assert_as_diffusers(pipe, finished(executor, [own])[0])


def test_new_jobs_join_while_others_are_drawn(executor: Executor, tiny_sd_folder: Path) -> None:
    """Jobs are pulled lazily: one batch is drawn, at most one waits, up to three images wait for a decode of four."""
    out = 0
    pulled = 0

    def stream() -> Iterator[Job]:
        nonlocal pulled
        for index in range(30):
            pulled += 1
            assert pulled - out <= 2 * executor.max_batch + 3
            yield job(candidate(tiny_sd_folder, steps=1 + index % 3), "a dog", index)

    for _ in executor.run(stream()):
        out += 1
    assert out == pulled == 30


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
def test_on_step_sees_diffusers_latents_and_may_replace_them(
    executor: Executor, pipe: StableDiffusionPipeline, tiny_sd_folder: Path, sampler: str
) -> None:
    def halve(latents: torch.Tensor, index: int) -> torch.Tensor | None:
        return latents * 0.5 if index == 2 else None

    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    timesteps: list[float] = []

    def on_step(step: Step) -> torch.Tensor | None:
        assert (step.index, step.steps) == (len(seen[step.job.key]), 5)
        seen[step.job.key].append(step.latents)
        if step.job.key == 1:
            timesteps.append(step.timestep)
        return halve(step.latents, step.index)

    one = candidate(tiny_sd_folder, sampler, 5)
    jobs = [job(one, "a dog", key) for key in range(2)]
    outcomes = {outcome.key: outcome for outcome in executor.run(jobs, on_step=on_step)}

    expected: list[torch.Tensor] = []
    expected_timesteps: list[float] = []

    def on_step_end(_: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> dict[str, Any]:
        expected.append(kwargs["latents"][0])
        expected_timesteps.append(float(timestep))
        replaced = halve(kwargs["latents"], index)
        return {} if replaced is None else {"latents": replaced}

    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    last = pipe(
        "a dog", num_inference_steps=5, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(1), callback_on_step_end=on_step_end,
    ).images[0]  # fmt: skip
    torch.testing.assert_close(torch.stack(seen[1]), torch.stack(expected), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(outcomes[1].latents, last, atol=1e-3, rtol=0)
    assert timesteps == expected_timesteps


def test_bf16_keeps_the_picture(executor: Executor, tiny_sd_folder: Path) -> None:
    """Latents stay float32 between steps, so only each step's own rounding shows."""
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))  # torch 2.11 draws another in bfloat16
    fp32, bf16 = (
        finished(executor, [Job("a dog", candidate(tiny_sd_folder, "ddim", 8, 2.0, precision=p), latents=noise)])[0]
        for p in ("fp32", "bf16")
    )
    assert fp32.latents is not None
    assert bf16.latents is not None
    assert bf16.latents.dtype == torch.float32
    assert not torch.equal(bf16.latents, bf16.latents.bfloat16().float())
    error = (bf16.latents - fp32.latents).norm() / fp32.latents.norm()
    assert error < 0.02


def test_each_prompt_is_encoded_once(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(device="cpu")
    one = candidate(tiny_sd_folder)
    engine, _ = executor.prepare(one)
    encoded: list[int] = []
    engine.shared.text.encoders[0].register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))  # type: ignore[attr-defined]
    prompts = ["a dog", "a dog", "a crown", "a dog"]
    finished(executor, [job(one, prompt, seed) for seed, prompt in enumerate(prompts)])
    assert sum(encoded) == 3, "a dog, a crown and the empty prompt"


def test_the_empty_prompt_is_encoded_once_an_engine(tiny_sd_folder: Path) -> None:
    executor = Executor(device="cpu")
    engine, _ = executor.prepare(candidate(tiny_sd_folder))
    encoded: list[int] = []
    engine.shared.text.encoders[0].register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))  # type: ignore[attr-defined]
    for seed in range(2):
        finished(executor, [job(candidate(tiny_sd_folder), "a dog", seed)])
    assert sum(encoded) == 3, "a dog in each run, the empty prompt in the first"


def test_no_jobs_no_images(executor: Executor) -> None:
    assert list(executor.run([])) == []


def test_importing_the_executor_imports_neither_diffusers_nor_transformers() -> None:
    code = "import sys, catimage_accel.executor; sys.exit(bool({'diffusers', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("max_batch", [0, -1, 2.0, True])
def test_refuses_a_batch_size(max_batch: Any) -> None:
    with pytest.raises(ValueError, match="max_batch is"):
        Executor(max_batch=max_batch)


def test_sides_may_be_numpys_whole_numbers(executor: Executor, tiny_sd_folder: Path) -> None:
    own = Job("a dog", candidate(tiny_sd_folder), torch.Generator().manual_seed(1), height=np.int64(96), width=64)  # type: ignore[arg-type]
    [outcome] = finished(executor, [own])
    assert outcome.image is not None
    assert outcome.image.shape == (96, 64, 3)
