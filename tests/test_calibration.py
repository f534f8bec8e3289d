"""What a UNet is given, recorded while real prompts are drawn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel import Candidate
from catimage_accel.calibration import record_inputs, spread_rows
from catimage_accel.engines import EagerEngine
from catimage_accel.executor import Executor, Job
from catimage_accel.executor.job import Step
from catimage_accel.quantize import UNetInputs
from catimage_accel.scoring import image_seed

PROMPTS = [f"{number} dogs" for number in range(10)]


def candidate(model: Path, steps: int = 4, sampler: str = "ddim", guidance_scale: float = 1.0, **options: Any) -> Any:
    return Candidate("one", str(model), steps, sampler, guidance_scale, options=options)


def parts(inputs: UNetInputs) -> list[torch.Tensor]:
    return [inputs.sample, inputs.timestep, inputs.encoder_hidden_states]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 50), st.integers(1, 64), st.integers(1, 400))
def test_rows_are_spread_evenly(steps: int, rows: int, number: int) -> None:
    found = spread_rows(steps, rows, number)
    assert len(found) == steps
    assert sum(map(len, found)) == min(number, steps * rows)
    assert all(len(set(step)) == len(step) and all(0 <= row < rows for row in step) for step in found)
    for counts in ([len(step) for step in found], [sum(row in step for step in found) for row in range(rows)]):
        assert max(counts) - min(counts) <= 1
    assert spread_rows(steps, rows, number) == found


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_step_and_prompt_is_recorded(tiny_sd_folder: Path, sampler: str, guidance_scale: float) -> None:
    told: list[int] = []
    one = candidate(tiny_sd_folder, 4, sampler, guidance_scale)
    inputs = record_inputs(one, PROMPTS, 40, advance=told.append)
    assert sum(told) == len(PROMPTS)
    assert inputs.sample.shape == (40, 4, 16, 16)
    assert set(Counter(inputs.timestep.tolist()).values()) == {10}
    assert inputs.timestep.tolist() == sorted(inputs.timestep.tolist(), reverse=True)
    engine = EagerEngine(tiny_sd_folder)
    texts = {prompt: engine.encode_prompts([prompt])[0].hidden for prompt in ["", *PROMPTS]}
    whose = Counter(
        next(prompt for prompt, text in texts.items() if torch.allclose(text, row, atol=1e-5))
        for row in inputs.encoder_hidden_states
    )
    if guidance_scale > 1:
        assert whose.pop("") == 20
    assert set(whose) == set(PROMPTS)
    assert max(whose.values()) - min(whose.values()) <= (1 if guidance_scale == 1 else 2)


def test_inputs_are_those_of_the_drawing(tiny_sd_folder: Path) -> None:
    one = candidate(tiny_sd_folder, 3)
    latents: dict[str, list[torch.Tensor]] = {prompt: [] for prompt in PROMPTS}

    def see(step: Step) -> None:
        latents[step.job.prompt].append(step.latents.clone())

    jobs = [Job(prompt, one, torch.Generator().manual_seed(image_seed(7, prompt))) for prompt in PROMPTS]
    assert all(finished.error is None for finished in Executor().run(jobs, on_step=see))
    inputs = record_inputs(one, PROMPTS, 1000, seed=7)
    assert len(inputs) == 3 * len(PROMPTS)  # all there are
    second = inputs.sample[len(PROMPTS) : 2 * len(PROMPTS)]
    # DDIM's samples are the latents themselves.
    expected = torch.stack([latents[prompt][0] for prompt in PROMPTS])
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_recording_is_deterministic(tiny_sd_folder: Path) -> None:
    one = candidate(tiny_sd_folder, 3, "euler", 3.0)
    first, again = (record_inputs(one, PROMPTS, 7) for _ in range(2))
    assert len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    other = record_inputs(one, PROMPTS, 7, seed=1)
    assert not torch.equal(first.sample, other.sample)


def test_deepcache_and_other_precisions_are_recorded(tiny_sd_folder: Path) -> None:
    cached = candidate(tiny_sd_folder, 4, deepcache_interval=2)
    assert len(record_inputs(cached, PROMPTS[:2], 8)) == 8
    half = Candidate("half", str(tiny_sd_folder), 2, "ddim", 1.0, precision="bf16")
    assert record_inputs(half, PROMPTS[:2], 4).sample.dtype == torch.float32


def broken_model(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder / "broken")
    path = folder / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    safetensors.torch.save_file(weights, path)
    return folder / "broken"


def test_inputs_that_are_not_finite_are_refused(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample has NaN or infinity in \d+ of \d+ rows; accepted") as raised:
        record_inputs(candidate(broken_model(tiny_sd_folder, tmp_path)), PROMPTS, 8)
    assert "\n" not in str(raised.value)


def test_bad_arguments(tiny_sd_folder: Path, tmp_path: Path) -> None:
    one = candidate(tiny_sd_folder)
    with pytest.raises(ValueError, match="prompts is empty"):
        record_inputs(one, [], 8)
    with pytest.raises(ValueError, match="rows is 0"):
        record_inputs(one, PROMPTS, 0)
    quantized = Candidate("q", str(tiny_sd_folder), 2, "ddim", 1.0, precision="int8", quantization="quantized/one")
    with pytest.raises(ValueError, match="candidate 'q' is quantized"):
        record_inputs(quantized, PROMPTS, 8)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        record_inputs(candidate(tmp_path / "nowhere"), PROMPTS, 8)
