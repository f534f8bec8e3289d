"""The noise schedule and DDIM's update are diffusers'."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from catimage_accel.snapfusion.schedule import END, NOISE, V, VelocitySchedule, clean_from, ddim_step


@pytest.fixture(scope="module", params=["trailing", "leading", "linspace"])
def folder(request: pytest.FixtureRequest, tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose few steps start at the noisiest timestep, one step short of it, or end at the first."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny_sd_folder / "scheduler", folder / "scheduler")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing=request.param)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 16, 50])
def test_a_trajectory_is_that_of_diffusers(folder: Path, steps: int) -> None:
    schedule = VelocitySchedule.of_model(folder)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    grid = schedule.grid(steps)
    assert grid.tolist() == [*scheduler.timesteps.tolist(), END]
    ours = theirs = torch.randn(2, 4, 8, 8)
    for now, after in zip(scheduler.timesteps, schedule.after(steps).split(1), strict=True):
        velocity = torch.sin(theirs) + now / 1000
        theirs = scheduler.step(velocity, int(now), theirs).prev_sample
        velocity = torch.sin(ours) + now / 1000
        ours = ddim_step(ours, velocity, schedule.rates(now.view(1)), schedule.rates(after))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 50])
def test_steps_that_divide_lead_to_the_next_timestep(tiny_sd_folder: Path, spacing: str, steps: int) -> None:
    schedule = respaced(tiny_sd_folder, timestep_spacing=spacing, steps_offset=1)
    assert torch.equal(schedule.after(steps), schedule.grid(steps)[1:])


def respaced(model: Path, **changes: object) -> VelocitySchedule:
    schedule = VelocitySchedule.of_model(model)
    scheduler = DDIMScheduler.from_config(schedule.config, **changes)
    cumulative = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)])
    return VelocitySchedule(cumulative.sqrt(), (1 - cumulative).sqrt(), dict(scheduler.config))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"timestep_spacing": "linspace"}, "is 'linspace', .* one of 4 DDIM steps stands still, at timestep 0"),
        ({"timestep_spacing": "leading", "steps_offset": 0}, "is 'leading', .* timestep 0: .*; accepted: 'trailing'"),
    ],
    ids=["from the first to the last", "no offset"],
)
def test_a_step_that_leads_nowhere_has_no_target(tiny_sd_folder: Path, changes: dict[str, object], told: str) -> None:
    """At timestep 0 there is as little noise as at the end, unless the end is said to have none at all."""
    respaced(tiny_sd_folder).check_targets(4)
    respaced(tiny_sd_folder, **changes, set_alpha_to_one=True).check_targets(4)
    with pytest.raises(ValueError, match=told):
        respaced(tiny_sd_folder, **changes).check_targets(4)


def test_nothing_but_noise_has_a_target_in_v_alone(tiny_sd_folder: Path) -> None:
    """At zero terminal SNR a prediction of noise says nothing of the picture."""
    schedule = respaced(tiny_sd_folder, rescale_betas_zero_snr=True)
    schedule.check_targets(4)
    with pytest.raises(ValueError, match="'epsilon', but at timestep 999 there is nothing but noise"):
        dataclasses.replace(schedule, predicted=NOISE).check_targets(4)


def test_steps_that_begin_beyond_the_last_timestep_are_refused(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="steps is 1000, which begin beyond timestep 999; take fewer"):
        respaced(tiny_sd_folder, timestep_spacing="leading", steps_offset=1).grid(1000)


def test_the_true_velocity_leads_from_any_timestep_to_any_other(tiny_sd_folder: Path) -> None:
    schedule = VelocitySchedule.of_model(tiny_sd_folder)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    for now, after in pairwise([999, 700, 61, END]):
        here, there = (schedule.rates(torch.tensor([at])) for at in (now, after))
        sample, velocity = here[0] * clean + here[1] * noise, here[0] * noise - here[1] * clean
        torch.testing.assert_close(clean_from(sample, velocity, *here), clean, rtol=1e-4, atol=1e-5)
        expected = there[0] * clean + there[1] * noise
        torch.testing.assert_close(ddim_step(sample, velocity, here, there), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_predicts_noise_is_refused_with_the_remedy(tmp_path: Path) -> None:
    DDIMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"'epsilon'; accepted: v_prediction.*catimage distill finetune"):
        VelocitySchedule.of_model(tmp_path)
    assert VelocitySchedule.of_model(tmp_path, accepted=(V, NOISE)).predicted == NOISE


def test_noise_and_v_of_one_picture_are_one_velocity(tmp_path: Path) -> None:
    DDIMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    schedule = VelocitySchedule.of_model(tmp_path, accepted=(NOISE,))
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([999, 500, 3])
    alpha, sigma = schedule.rates(timestep)
    sample = alpha * clean + sigma * noise
    torch.testing.assert_close(
        schedule.velocity(sample, noise, timestep), alpha * noise - sigma * clean, rtol=1e-4, atol=1e-4
    )
