"""A catalog of SDXL candidates through every command: plain, turbo-like, with a LoRA, and in INT8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from catimage_accel import Candidate, Catalog, RoutedPipeline
from catimage_accel.calibration import record_inputs
from catimage_accel.cli import app
from catimage_accel.engines import EagerEngine
from catimage_accel.storage import file_sha256

PROMPTS = [f"{number} dogs and a cat" for number in range(12)]


def catimage(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def catalog(tiny_sdxl_folder: Path, tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "catalog"
    shutil.copytree(tiny_sdxl_folder, folder / "model")
    shutil.copytree(tiny_catalog / "judge", folder / "judge")
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipe.unet)
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=weights, weight_name="lcm.safetensors")
    Catalog(
        folder, "sdxl",
        (
            Candidate("base-4", "model", 4, "dpmsolver++", 5.0),
            Candidate("turbo-1", "model", 1, "euler_ancestral", 0.0, timestep_spacing="trailing"),
            Candidate("lcm-3", "model", 3, "lcm", 1.0, lora="lcm.safetensors"),
        ),
        judge="judge",
    ).save(folder)  # fmt: skip
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def measured(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        prompts = catalog / "prompts.txt"
        for one in ("base-4", "lcm-3"):
            catimage("quantize", catalog, "--candidate", one, "--prompts", prompts, "--number", 4, "--rows", 16)
        catimage("profile", catalog, "--prompts", prompts)
        catimage("engine", "tune", catalog, "--engine", "eager", "--engine", "onnxruntime", "--batch", 1)
        catimage("router", "fit", catalog, "--features", "ngrams")
    return catalog


def test_every_candidate_is_measured(measured: Path) -> None:
    loaded = Catalog.load(measured, verify=False)
    names = ["base-4", "turbo-1", "lcm-3", "base-4-int8", "lcm-3-int8"]
    assert [one.name for one in loaded.candidates] == names
    assert set(loaded.mean_scores()) == set(loaded.flops) == set(names)
    [times] = loaded.milliseconds.values()
    assert set(times["onnxruntime"]) == set(times["eager"]) == set(names)
    assert loaded.candidate("lcm-3-int8").lora == "lcm.safetensors"
    digits = file_sha256(measured / "lcm.safetensors")[:8]
    assert [one.quantization for one in loaded.candidates[3:]] == [
        "quantized/unet-int8", f"quantized/unet-lcm-{digits}-1-int8",
    ]  # fmt: skip


def test_flops_are_what_the_engine_runs(measured: Path) -> None:
    flops = Catalog.load(measured, verify=False).flops
    engine = EagerEngine(measured / "model")
    text = engine.gather(engine.encode_prompts(["a dog"]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        engine.denoise(torch.zeros(1, 4, 16, 16), torch.zeros(1), text, text.added_conditions(64, 64))
    step = counter.get_total_flops()
    assert flops["lcm-3"] - flops["turbo-1"] == 2 * step
    assert flops["lcm-3"] == flops["lcm-3-int8"]


def test_pictures_are_routed_and_drawn_by_all(measured: Path, tmp_path: Path) -> None:
    done = catimage("generate", "a dog", "--catalog", measured, "--candidate", "lcm-3", "--seed", 7, "--out", tmp_path)
    assert "lcm-3" in done.output
    [file] = tmp_path.glob("*.png")
    pipe = RoutedPipeline.from_pretrained(measured)
    generator = torch.Generator().manual_seed(7)
    alone = pipe(["a dog"], candidate="lcm-3", generator=generator)
    assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(alone.images[0]).astype(int)).max() <= 1
    out = pipe(["a dog", *PROMPTS], tradeoff=0.05, generator=torch.Generator().manual_seed(0))
    assert {image.size for image in out.images} == {(64, 64)}
    assert all(set(route.predicted_quality) == set(pipe.catalog.flops) for route in out.routes)
    wide = pipe(["a dog"], candidate="base-4-int8", height=48, width=80, generator=torch.Generator().manual_seed(0))
    assert wide.images[0].size == (80, 48)


def test_candidates_are_listed_with_spacing_and_lora(measured: Path) -> None:
    rows = [json.loads(line) for line in catimage("candidates", "--catalog", measured, "--json").stdout.splitlines()]
    found = {row["name"]: row for row in rows}
    assert found["turbo-1"]["timestep_spacing"] == "trailing"
    assert (found["lcm-3"]["lora"], found["lcm-3"]["lora_scale"]) == ("lcm.safetensors", 1.0)
    shown = " ".join(catimage("candidates", "--catalog", measured).stdout.split())
    assert "trailing euler_ancestral" in shown
    assert "lcm.safetensors" in shown


def test_calibration_sees_the_added_conditions(catalog: Path) -> None:
    one = Candidate("one", str(catalog / "model"), 2, "ddim", 3.0)
    inputs = record_inputs(one, PROMPTS[:3], 100)
    assert inputs.text_embeds is not None
    assert inputs.time_ids is not None
    assert inputs.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 12
    zeros = (inputs.text_embeds == 0).all(1)
    assert int(zeros.sum()) == 6, "half of the rows are for no prompt, which is zeros"
    assert (inputs.encoder_hidden_states[zeros] == 0).all()
    engine = EagerEngine(catalog / "model")
    expected = engine.encode_prompts([PROMPTS[0]])[0].encoded.pooled
    assert expected is not None
    assert any(torch.allclose(row, expected, atol=1e-5) for row in inputs.text_embeds)


def test_sizes_go_in_with_the_whole_prompt(catalog: Path) -> None:
    one = Candidate("one", str(catalog / "model"), 1, "ddim", 1.0)
    inputs = record_inputs(one, PROMPTS[:1], 1)
    with pytest.raises(ValueError, match="time_ids is None; accepted: text_embeds with time_ids, or neither"):
        type(inputs)(inputs.sample, inputs.timestep, inputs.encoder_hidden_states, inputs.text_embeds)


def test_distillation_refuses_it(catalog: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "guided.toml"
    recipe.write_text(
        f'model = "{catalog / "model"}"\nprompts = "{catalog / "prompts.txt"}"\nnumber = 12\nteacher_steps = 2\n'
        "student_steps = 2\nguidance_scale = 3.0\n[training]\nsteps = 1\nbatch_size = 2\nlearning_rate = 1e-3\n"
    )
    done = CliRunner().invoke(app, ["distill", "guidance", str(recipe), "--work", str(tmp_path)])
    assert done.exit_code == 2
    assert "which has two text encoders; accepted: models of Stable" in " ".join(done.stderr.split())
