"""SDXL's layout in the executor, against diffusers' own pipeline: two text encoders, sizes, zeros for no prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from schedulers import SCHEDULERS

from catimage_accel.candidate import Candidate
from catimage_accel.executor import Executor, Finished, Job

PROMPTS = ("a dog", "a crown, a dog and a bear on a pink background", "")


def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_sdxl_folder: Path) -> StableDiffusionXLPipeline:
    return pipeline(tiny_sdxl_folder)


def jobs_of(folder: Path, *, engine: str = "auto") -> list[Job]:
    """Guided and not, of two sizes, with samplers that add noise and that don't: more than one batch holds."""
    mix = [("ddim", 5, 3.0, 64, 64), ("euler_ancestral", 3, 1.0, 64, 64), ("dpmsolver++", 6, 7.5, 64, 64)]
    mix += [("ddim", 4, 3.0, 48, 80), ("euler_ancestral", 4, 2.0, 48, 80), ("ddim", 2, 0.0, 64, 64)]
    return [
        Job(
            PROMPTS[index % 3], Candidate("one", str(folder), steps, sampler, guidance, engine=engine),
            torch.Generator().manual_seed(index), key=index, height=height, width=width,
        )
        for index, (sampler, steps, guidance, height, width) in enumerate(mix)
    ]  # fmt: skip


def drawn(executor: Executor, jobs: list[Job]) -> list[Finished]:
    outcomes = {outcome.key: outcome for outcome in executor.run(jobs)}
    for outcome in outcomes.values():
        if outcome.error is not None:
            raise outcome.error
    return [outcomes[one.key] for one in jobs]


def with_diffusers(pipe: StableDiffusionXLPipeline, one: Job, output_type: str = "latent") -> Any:
    c = one.candidate
    pipe.scheduler = SCHEDULERS[c.sampler].from_config(DDIMScheduler.load_config(Path(c.model) / "scheduler"))
    return pipe(
        one.prompt, num_inference_steps=c.steps, guidance_scale=c.guidance_scale, output_type=output_type,
        generator=torch.Generator().manual_seed(one.key), height=one.height, width=one.width,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    "reproducible", [pytest.param(False, id="in batches"), pytest.param(True, id="image by image")]
)
def test_latents_and_images_in_a_mixed_batch(
    pipe: StableDiffusionXLPipeline, tiny_sdxl_folder: Path, reproducible: bool
) -> None:
    executor = Executor(device="cpu", max_batch=3, reproducible=reproducible)
    for outcome in drawn(executor, jobs_of(tiny_sdxl_folder)):
        assert outcome.latents is not None
        assert outcome.image is not None
        torch.testing.assert_close(outcome.latents, with_diffusers(pipe, outcome.job), atol=1e-3, rtol=0)
        assert np.abs(outcome.image - with_diffusers(pipe, outcome.job, "np") * 255).max() < 1.0


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "compiled"])
def test_other_engines_draw_the_same(tiny_sdxl_folder: Path, tmp_path: Path, engine: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path))
    eager, other = (Executor(device="cpu", max_batch=4, fall_back=False) for _ in range(2))
    expected = drawn(eager, jobs_of(tiny_sdxl_folder))
    for one, reference in zip(drawn(other, jobs_of(tiny_sdxl_folder, engine=engine)), expected, strict=True):
        assert one.latents is not None
        assert reference.latents is not None
        torch.testing.assert_close(one.latents, reference.latents, atol=2e-3, rtol=0)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_deepcache_with_an_interval_of_one_is_the_whole_unet(
    tiny_sdxl_folder: Path, tmp_path: Path, engine: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path))
    executor = Executor(device="cpu", fall_back=False)
    whole = Candidate("one", str(tiny_sdxl_folder), 5, "ddim", 3.0, engine=engine)
    cached = replace(whole, options={"deepcache_interval": 2})
    outcomes = drawn(executor, [
        Job(PROMPTS[1], candidate, torch.Generator().manual_seed(0), key=index)
        for index, candidate in enumerate([whole, replace(whole, options={"deepcache_interval": 1}), cached])
    ])  # fmt: skip
    first, same, other = (outcome.latents for outcome in outcomes)
    assert first is not None
    assert same is not None
    assert other is not None
    torch.testing.assert_close(same, first, atol=1e-4, rtol=0)
    assert (other - first).abs().max() > 1e-4, "deep features were kept"


def test_the_empty_prompt_is_zeros_only_where_the_folder_says_so(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    outcomes = [drawn(Executor(device="cpu"), jobs_of(one)[:1])[0] for one in (folder, tiny_sdxl_folder)]
    for one, outcome in zip((folder, tiny_sdxl_folder), outcomes, strict=True):
        assert outcome.latents is not None
        torch.testing.assert_close(
            outcome.latents, with_diffusers(pipeline(one), outcome.job), atol=1e-3, rtol=0
        )  # fmt: skip
    assert outcomes[0].latents is not None
    assert outcomes[1].latents is not None
    assert not torch.allclose(outcomes[0].latents, outcomes[1].latents, atol=1e-3)


def test_the_scheduler_config_is_taken_as_it_is(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """diffusers moves the steps of Stable Diffusion's early configs by one, and not SDXL's."""
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0, timestep_spacing="leading")
    [outcome] = drawn(Executor(device="cpu"), jobs_of(folder)[:1])
    assert outcome.latents is not None
    torch.testing.assert_close(outcome.latents, with_diffusers(pipeline(folder), outcome.job), atol=1e-3, rtol=0)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(without("tokenizer_2"), FileNotFoundError, "tokenizer_2 is missing", id="one tokenizer"),
        pytest.param(without("text_encoder"), FileNotFoundError, "text_encoder", id="a refiner has no first encoder"),
        pytest.param(
            without("text_encoder_2"), ValueError, "embed_type is 'text_time'; accepted: None", id="one encoder"
        ),
        pytest.param(
            lambda folder: edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=60),
            ValueError, "takes 12 features beside six sizes, text_encoder_2 gives 20", id="a refiner takes five sizes",
        ),
        pytest.param(
            lambda folder: edit(folder / "unet" / "config.json", addition_embed_type="image"),
            ValueError, "addition_embed_type is 'image'; accepted: 'text_time'", id="another kind of condition",
        ),
        pytest.param(
            lambda folder: edit(folder / "text_encoder_2" / "config.json", architectures=["T5EncoderModel"]),
            ValueError, "the class is 'T5EncoderModel'; accepted: CLIPTextModelWithP", id="class of an encoder",
        ),
        pytest.param(
            lambda folder: edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
            ValueError, "latents_mean and latents_std are set", id="latents of another mean",
        ),
    ],
)  # fmt: skip
def test_refuses_before_a_weight_is_read(
    tiny_sdxl_folder: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(error, match=message):
        Executor(device="cpu").check(Candidate("one", str(folder), 2, "ddim", 1.0))
