"""Coefficient tables against the diffusers schedulers that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import SCHEDULERS

from catimage_accel.executor import SAMPLERS, sampler_table
from catimage_accel.executor.samplers import TIMESTEP_SPACINGS

ZOO: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
}  # fmt: skip


def fake_unet(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Nonlinear in the sample and the timestep, so that a wrong row or order of steps shows."""
    return torch.tanh(0.7 * sample + 0.5 * sample.roll(1) - timestep / 1000)


def with_diffusers(sampler: str, steps: int, config: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    scheduler = SCHEDULERS[sampler].from_config(config)
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    random = {"generator": torch.Generator().manual_seed(7)} if sampler in ("euler_ancestral", "lcm") else {}
    for timestep in scheduler.timesteps:
        eps = fake_unet(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(eps, timestep, latents, return_dict=False, **random)[0]
    return latents


def with_table(sampler: str, steps: int, config: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    table = sampler_table(sampler, steps, config)
    sample, history = noise * table.initial_scale, torch.zeros_like(noise)
    generator = torch.Generator().manual_seed(7)
    for step, (timestep, (s, e, h, p, q)) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        eps = fake_unet(sample, float(timestep))
        third = torch.randn(noise.shape, generator=generator) if step < table.noises else history
        sample, history = s * sample + e * eps + h * third, p * sample + q * eps
    return sample


def assert_same(sampler: str, steps: int, config: dict[str, Any]) -> None:
    noise = torch.randn(64, generator=torch.Generator().manual_seed(steps))
    expected = with_diffusers(sampler, steps, config, noise)
    actual = with_table(sampler, steps, config, noise)
    assert torch.isfinite(expected).all()
    scale = expected.abs().max().clamp(min=1.0)
    assert ((actual - expected).abs().max() / scale).item() < 2e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(1, id="1-first step is last"),
        pytest.param(2, id="2-no second-order step"),
        pytest.param(4, id="4-zoo"),
        pytest.param(14, id="14-lower_order_final applies"),
        pytest.param(15, id="15-lower_order_final no longer applies, 1000/15 is no whole number"),
        pytest.param(50, id="50-zoo"),
        pytest.param(61, id="61-rounding makes diffusers take 62 timesteps"),
    ],
)
def test_zoo_schedule(sampler: str, steps: int) -> None:
    if sampler == "lcm" and steps > 50:
        with pytest.raises(ValueError, match="steps is 61; accepted: 1 to 50, the model's original_inference_steps"):
            sampler_table(sampler, steps, ZOO)
    else:
        assert_same(sampler, steps, ZOO)


@settings(max_examples=40, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    steps=st.integers(1, 60),
    prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    timestep_spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
    set_alpha_to_one=st.booleans(),
    final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
    steps_offset=st.sampled_from([0, 1]),
    solver_type=st.sampled_from(["midpoint", "heun"]),
    lower_order_final=st.booleans(),
    euler_at_final=st.booleans(),
    use_karras_sigmas=st.booleans(),
)
def test_any_schedule(sampler: str, steps: int, **config: Any) -> None:
    schedule = {**ZOO, **config}
    if sampler == "lcm":
        steps = min(steps, 50)
    if sampler == "euler_ancestral" and schedule["prediction_type"] == "sample":
        with pytest.raises(ValueError, match="prediction_type is 'sample'"):  # which diffusers hasn't implemented
            sampler_table(sampler, steps, schedule)
    elif not torch.isfinite(with_diffusers(sampler, steps, schedule, torch.ones(4))).all():
        with pytest.raises(ValueError, match="divides by zero"):  # where diffusers gives NaN
            sampler_table(sampler, steps, schedule)
    else:
        assert_same(sampler, steps, schedule)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmsolver++"])
@pytest.mark.parametrize("timestep_spacing", TIMESTEP_SPACINGS)
def test_spacing_of_the_candidate_stands_before_the_configs(sampler: str, timestep_spacing: str) -> None:
    actual = sampler_table(sampler, 4, ZOO, timestep_spacing)
    expected = sampler_table(sampler, 4, {**ZOO, "timestep_spacing": timestep_spacing})
    np.testing.assert_array_equal(actual.timesteps, expected.timesteps)
    np.testing.assert_array_equal(actual.coefficients, expected.coefficients)
    same_as_config = np.array_equal(actual.timesteps, sampler_table(sampler, 4, ZOO).timesteps)
    assert same_as_config == (timestep_spacing == "trailing")


@pytest.mark.parametrize(
    ("sampler", "spacing", "message"),
    [
        pytest.param("ddim", "even", "timestep_spacing is 'even'; accepted: leading, linspace, trailing", id="unknown"),
        pytest.param("lcm", "trailing", "with sampler 'lcm'; accepted: none", id="LCM has its own"),
    ],
)
def test_refuses_spacings(sampler: str, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_table(sampler, 4, ZOO, spacing)


def test_denoised_is_diffusers_prediction_of_the_clean_latents() -> None:
    table = sampler_table("ddim", 10, ZOO)
    scheduler = DDIMScheduler.from_config(ZOO)
    scheduler.set_timesteps(10)
    sample, eps = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for row, timestep in zip(table.coefficients, scheduler.timesteps, strict=True):
        expected = scheduler.step(eps, timestep, sample).pred_original_sample
        torch.testing.assert_close(row[3] * sample + row[4] * eps, expected)


def test_euler_scales_give_diffusers_latents_after_every_step() -> None:
    table = sampler_table("euler", 7, ZOO)
    scheduler = EulerDiscreteScheduler.from_config(ZOO)
    scheduler.set_timesteps(7)
    np.testing.assert_allclose(table.scales[:-1], np.sqrt(scheduler.sigmas[1:-1].numpy() ** 2 + 1), rtol=1e-6)
    assert table.scales[-1] == 1.0


@pytest.mark.parametrize(
    ("sampler", "steps", "config", "message"),
    [
        pytest.param(
            "plms", 4, {}, "sampler is 'plms'; accepted: ddim, euler, euler_ancestral, dpmsolver++, lcm", id="unknown"
        ),
        pytest.param("ddim", 0, {}, "steps is 0; accepted: 1 to 1000", id="no steps"),
        pytest.param("ddim", 1001, {}, "steps is 1001; accepted: 1 to 1000", id="more steps than timesteps"),
        pytest.param("ddim", 2.0, {}, "steps is 2.0", id="steps is a float"),
        pytest.param("ddim", True, {}, "steps is True", id="steps is a bool"),
        pytest.param("ddim", 4, {"clip_sample": True}, "clip_sample is True", id="clipping is not linear"),
        pytest.param("euler", 4, {"prediction_type": "flow"}, "prediction_type is 'flow'", id="unknown prediction"),
        pytest.param("dpmsolver++", 4, {"solver_order": 3}, "solver_order is 3", id="third order"),
        pytest.param("dpmsolver++", 4, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type", id="stochastic"),
        pytest.param("lcm", 4, {"clip_sample": True}, "clip_sample is True", id="clipping in LCM"),
        pytest.param("euler", 4, {"_class_name": "EDMEulerScheduler"}, "is of EDMEulerScheduler", id="EDM's schedule"),
        pytest.param("ddim", 4, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of FlowMatch", id="no betas"),
        pytest.param("dpmsolver++", 4, {"thresholding": True}, "thresholding is True", id="thresholding"),
        pytest.param(
            "dpmsolver++", 1000, {"timestep_spacing": "leading"}, "divides by zero", id="all timesteps the same"
        ),
    ],
)  # fmt: skip
def test_refuses(sampler: str, steps: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        sampler_table(sampler, steps, {**ZOO, **config})
