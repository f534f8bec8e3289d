"""The recipes run unchanged on a model of Stable Diffusion 1.5's shape: fine-tuning, then fewer steps."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from catimage_accel.snapfusion import distill
from catimage_accel.snapfusion.distill import distill_guidance, distill_steps, finetune
from catimage_accel.snapfusion.losses import StepLoss

CPU = torch.device("cpu")
Recipe = Callable[..., Path]
UNGUIDED = {"data": None, "prompts": "words.txt", "number": 3, "teacher_steps": 2, "student_steps": 2,
            "guidance_scale": 5.0, "guidance_rescale": 0.4}  # fmt: skip
FEWER = {"teacher_steps": 4, "student_steps": 2, "guidance": [2.0, 5.0], "cfg_probability": 0.5}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_fine_tuning_then_two_steps_for_four(recipe: Recipe, tmp_path: Path) -> None:
    work, validation = tmp_path / "work", {"every": 2, "prompts": "words.txt", "number": 3, "judge": "judge"}
    (tmp_path / "words.txt").write_text("a dog\n\ntwo cats\na bee\na star\n")
    first = finetune(recipe("tuned", teacher_weight=0.5, validation=validation), work, CPU)
    assert first == work / "tuned" / "unet"
    path = recipe("fewer", student="run:tuned", teacher="run:tuned", validation=validation, **FEWER)
    second = distill_steps(path, work, CPU)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())
    record = json.loads((work / "fewer" / "run.json").read_text())
    assert (record["teacher_steps"], record["student"], record["config"]["steps"]) == (4, "run:tuned", 3)
    assert [step for step, _ in record["clip_scores"]] == [2, 3]
    assert "_name_or_path" not in json.loads((second / "config.json").read_text())  # no path of the machine it ran on
    assert Image.open(work / "fewer" / "validation" / "step-000003.png").size == (3 * 64, 64)
    unet = UNet2DConditionModel.from_pretrained(second)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", unet=unet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a dog", num_inference_steps=2).images[0].size == (64, 64)


def test_guidance_is_taught_from_prompts_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a dog\n\ntwo cats\na bee\na star\n")
    validation = {"every": 3, "prompts": "words.txt", "number": 2, "judge": "judge"}
    path = recipe("unguided", validation=validation, **UNGUIDED)
    found = distill_guidance(path, tmp_path / "work", CPU, steps=2)
    begun = weights(found)
    again = weights(distill_guidance(path, tmp_path / "work", CPU))  # goes on to its third step
    whole = weights(distill_guidance(path, tmp_path / "whole", CPU))
    assert any(not torch.equal(value, begun[name]) for name, value in whole.items())
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    record = json.loads((tmp_path / "whole" / "unguided" / "run.json").read_text())
    assert record["source"].startswith("prompts-3-")
    assert (record["guidance_scale"], record["guidance_rescale"], len(record["clip_scores"])) == (5.0, 0.4, 1)
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\na wolf\n")
    with pytest.raises(ValueError, match="source = "):
        distill_guidance(path, tmp_path / "whole", CPU, steps=4)


def test_guidance_is_taught_to_a_model_that_predicts_noise(recipe: Recipe, tmp_path: Path) -> None:
    """As Stable Diffusion 1.5 does; the other methods want v."""
    path = recipe("unguided", **UNGUIDED)
    DDIMScheduler.from_pretrained(
        tmp_path / "model", subfolder="scheduler", prediction_type="epsilon"
    ).save_pretrained(tmp_path / "model" / "scheduler")  # fmt: skip
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\n")
    found = distill_guidance(path, tmp_path / "work", CPU)
    assert any(not torch.equal(value, weights(found)[name]) for name, value in weights(tmp_path / "model/unet").items())
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", unet=UNet2DConditionModel.from_pretrained(found), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe("a dog", num_inference_steps=2, guidance_scale=1.0, output_type="np").images).all()
    with pytest.raises(ValueError, match="'epsilon'; accepted: v_prediction"):
        finetune(recipe("v"), tmp_path / "work", CPU)


def test_a_batch_of_half_pictures_is_told_before_anything_is_loaded(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe("unguided", {"batch_size": 3}, **(UNGUIDED | {"model": "nowhere"}))
    with pytest.raises(ValueError, match=r"batch_size is 3; accepted: a multiple of student_steps \(2\)"):
        distill_guidance(path, tmp_path / "work", CPU)


def test_start_weight_moves_the_result_towards_its_start_without_training_again(recipe: Recipe, tmp_path: Path) -> None:
    start = {name: value.float() for name, value in weights(tmp_path / "model" / "unet").items()}
    trained = weights(finetune(recipe("tuned"), tmp_path / "work", CPU))
    log = (tmp_path / "work" / "tuned" / "loss.jsonl").read_text()
    machine = tmp_path / "work" / "tuned" / "machine.json"
    machine.write_text(machine.read_text().replace('"device": "', '"device": "another '))
    mixed = weights(finetune(recipe("tuned", start_weight=0.25), tmp_path / "work", CPU))
    assert (tmp_path / "work" / "tuned" / "loss.jsonl").read_text() == log
    record = json.loads((tmp_path / "work" / "tuned" / "run.json").read_text())
    assert record["start_weight"] == 0.25
    assert record["device"].startswith("another CPU, ")  # the machine that trained, not the one that mixed
    for name, value in mixed.items():
        expected = 0.75 * trained[name].float() + 0.25 * start[name]
        torch.testing.assert_close(value.float(), expected, rtol=2e-3, atol=1e-5)  # both are kept in float16


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("fewer", **FEWER)
    whole = weights(distill_steps(path, tmp_path / "whole", CPU))
    calls = []

    class Stopped(StepLoss):
        def __call__(self, *given):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(*given)

    monkeypatch.setattr(distill, "StepLoss", Stopped)
    with pytest.raises(KeyboardInterrupt):
        distill_steps(path, tmp_path / "cut", CPU)
    assert not (tmp_path / "cut" / "fewer" / "unet").exists()
    resumed = weights(distill_steps(path, tmp_path / "cut", CPU))
    assert len(calls) == 4
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_processes_run_recipes_that_begin_with_each_other_s_results(recipe: Recipe, tmp_path: Path) -> None:
    """By the command that the documentation has; the second process may come to the second recipe first."""
    paths = [recipe("tuned", {"batch_size": 1}), recipe("further", {"batch_size": 1}, student="run:tuned")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = ["-m", "catimage_accel.cli", "distill", "finetune", *map(str, paths), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, *launch, *command, "--threads", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = (weights(tmp_path / "work" / name / "unet") for name in ("tuned", "further"))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    assert not list((tmp_path / "work").glob("*/.*"))
    one = weights(finetune(recipe("tuned", {"batch_size": 1, "accumulation": 2}), tmp_path / "one", CPU))
    for name, value in first.items():  # the same batches, in one process
        torch.testing.assert_close(value.float(), one[name].float(), rtol=1e-2, atol=1e-3)


def test_another_recipe_of_the_same_name_does_not_go_on(recipe: Recipe, tmp_path: Path) -> None:
    distill_steps(recipe("fewer", **FEWER), tmp_path / "work", CPU)
    before = weights(tmp_path / "work" / "fewer" / "unet")
    with pytest.raises(ValueError, match=r"cfg_probability = 0\.5, this run has 0\.1"):
        distill_steps(recipe("fewer", **(FEWER | {"cfg_probability": 0.1})), tmp_path / "work", CPU)
    after = weights(tmp_path / "work" / "fewer" / "unet")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def epsilon(model: Path) -> None:
    DDIMScheduler(prediction_type="epsilon").save_pretrained(model / "scheduler")


def other_channels(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"in_channels": 8, "out_channels": 8}).save_pretrained(model / "unet")


def other_text(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"cross_attention_dim": 48}).save_pretrained(model / "unet")


@pytest.mark.parametrize(
    ("spoil", "fields", "told"),
    [
        (epsilon, {}, r"prediction_type is 'epsilon'; accepted: v_prediction"),
        (other_channels, {}, r"'unet' has 8 channels in and 8 out; accepted: 4"),
        (other_text, {}, r"'unet' takes text of 48 features; .*text_encoder gives 32"),
        (None, {"student": "run:nothing"}, r"'run:nothing' is no UNet: .*or run:NAME of a run"),
        (None, {"model": "nowhere"}, r"model is 'nowhere', but .* is no diffusers folder"),
        (None, {"data": "emoji:many"}, r"data is 'emoji:many'; accepted: 'emoji', or emoji:200000"),
        (None, {"teacher_steps": 3}, r"teacher_steps is 3; accepted: a multiple of student_steps \(2\)"),
    ],
    ids=[
        "it predicts noise", "other latents", "other text", "no such run", "no model", "no number of scenes",
        "steps that do not divide",
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path, spoil: Callable[[Path], None] | None, fields: dict, told: str
) -> None:
    path = recipe("fewer", **(FEWER | fields))
    if spoil is not None:
        spoil(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        distill_steps(path, tmp_path / "work", CPU)
    assert not (tmp_path / "work" / "fewer").exists()
