"""Samplers as coefficient tables: every step of DDIM, Euler, DPM-Solver++ and LCM is linear in three tensors.

A table holds, for each step, the timestep that the UNet is given and the row ``[s, e, h, p, q]`` of::

    denoised = p * sample + q * eps                        # the predicted clean latents
    next     = s * sample + e * eps + h * third

where ``eps`` is the UNet's (guided) output, whatever it predicts, and ``third`` the previous step's denoised latents
or, for samplers that add noise in every step (Euler ancestral, LCM), unit Gaussian noise. The schedule (timesteps,
sigmas, cumulative alphas) is read from the diffusers scheduler of the same name, built for the table and thrown away: a
table has no state and may be shared by any number of images.

Both Eulers' latents have a standard deviation of sqrt(sigma^2 + 1), and diffusers divides them by it before every UNet
call. Here they are kept divided, so that a sample is the UNet's input for every sampler; ``scales`` brings them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catimage_accel.engines.loading import has_two_text_encoders, read_config

__all__ = ["SAMPLERS", "TIMESTEP_SPACINGS", "SamplerTable", "read_scheduler_config", "sampler_table"]

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class SamplerTable:
    """One sampler at one number of steps.

    ``timesteps`` (steps,) float32; ``coefficients`` (steps, 5) float32, rows ``[s, e, h, p, q]``; ``initial_scale``
    turns unit Gaussian noise into the first sample; ``scales`` (steps,) float32 turns the sample after each step into
    diffusers' latents (1 after the last step; 1 throughout except for the Eulers). ``noises`` is how many times noise
    is drawn while it samples, as diffusers does: once after each of the first so many steps. With any, ``h``
    multiplies that noise, in all rows.
    """

    sampler: str
    timesteps: np.ndarray
    coefficients: np.ndarray
    initial_scale: float
    scales: np.ndarray
    noises: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)


def read_scheduler_config(model: Path) -> dict[str, Any]:
    """The scheduler config of a diffusers folder, as it is inside the pipeline that diffusers makes of that folder.

    ``StableDiffusionPipeline`` corrects configs of its early days when it is made: ``steps_offset`` becomes 1 and
    ``clip_sample`` False; SDXL's takes them as they are. Raises FileNotFoundError or ValueError naming the file.
    """
    config = read_config(model / "scheduler" / "scheduler_config.json")
    if has_two_text_encoders(model):
        return config
    if "steps_offset" in config:
        config["steps_offset"] = 1
    config["clip_sample"] = False
    return config


def sampler_table(
    sampler: str, steps: int, config: Mapping[str, Any], timestep_spacing: str | None = None
) -> SamplerTable:
    """The table of ``sampler``, one of ``SAMPLERS``, for ``steps`` steps of a model.

    ``config`` is the model's scheduler config, of whichever scheduler class: as in diffusers, the sampler's own class
    is built ``from_config`` of it. ``timestep_spacing``, one of ``TIMESTEP_SPACINGS``, instead of the config's. Where
    diffusers itself makes one timestep more than asked for (61 steps with "trailing", by rounding), so does the table.

    Raises ValueError for an unknown sampler or spacing, for steps outside 1 to ``num_train_timesteps`` ("lcm": to
    ``original_inference_steps``), for a spacing with "lcm", which has its own, and for a config whose update is not
    linear (sample clipping, thresholding, third-order or SDE solvers), whose schedule is another kind (EDM's, flow
    matching's) or divides by zero.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; accepted: {', '.join(SAMPLERS)}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ValueError(f"steps is {steps!r}; accepted: a whole number")
    if timestep_spacing is not None:
        _check_spacing(sampler, timestep_spacing)
        config = {**config, "timestep_spacing": timestep_spacing}
    _refuse_other_schedules(config)
    scheduler_class, build = _samplers()[sampler]
    scheduler = scheduler_class.from_config(dict(config))
    most = int(scheduler.config.num_train_timesteps)
    bound = "original_inference_steps" if sampler == "lcm" else "num_train_timesteps"
    if not 1 <= steps <= scheduler.config[bound]:
        raise ValueError(f"steps is {steps}; accepted: 1 to {scheduler.config[bound]}, the model's {bound}")
    _refuse_unsupported(sampler, scheduler.config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.numpy()
    if timesteps.max() <= most - 1 and (timesteps == timesteps[0]).sum() == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            table = build(scheduler)
        if np.isfinite(table.coefficients).all():
            return table
    raise ValueError(
        f"sampler {sampler!r} at {steps} steps divides by zero, starts beyond timestep {most - 1} or starts twice with "
        f"timestep_spacing {scheduler.config.timestep_spacing!r}; accepted: fewer steps or another spacing"
    )


def _samplers() -> dict[str, tuple[Any, Callable[[Any], SamplerTable]]]:
    from diffusers import (  # slow: used when needed
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
    )

    return {
        "ddim": (DDIMScheduler, _ddim),
        "euler": (EulerDiscreteScheduler, _euler),
        "euler_ancestral": (EulerAncestralDiscreteScheduler, _euler_ancestral),
        "dpmsolver++": (DPMSolverMultistepScheduler, _dpmsolver),
        "lcm": (LCMScheduler, _lcm),
    }


def _check_spacing(sampler: str, timestep_spacing: str) -> None:
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}; accepted: {', '.join(TIMESTEP_SPACINGS)}")
    if sampler == "lcm":
        raise ValueError(f"timestep_spacing is {timestep_spacing!r} with sampler 'lcm'; accepted: none, it has its own")


def _refuse_other_schedules(config: Mapping[str, Any]) -> None:
    """Configs without betas, of which the classes here would silently take their own defaults."""
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")) or "sigma_data" in config:
        raise ValueError(f"the scheduler config is of {kind or 'EDM'}; accepted: schedulers with betas, such as DDIM's")


def _refuse_unsupported(sampler: str, config: Any) -> None:
    accepted: dict[str, tuple[Any, ...]] = {"prediction_type": _PREDICTION_TYPES, "thresholding": (False, None)}
    if sampler == "euler_ancestral":
        accepted["prediction_type"] = ("epsilon", "v_prediction")  # diffusers has no other
    if sampler in ("ddim", "lcm"):
        accepted["clip_sample"] = (False, None)
    if sampler == "dpmsolver++":
        accepted |= {
            "algorithm_type": ("dpmsolver++",), "solver_order": (1, 2), "use_flow_sigmas": (False, None),
            "variance_type": (None,),
        }  # fmt: skip
    for name, values in accepted.items():
        value = config.get(name)
        if name in config and value not in values:
            raise ValueError(f"the scheduler config's {name} is {value!r}; sampler {sampler!r} accepts {values}")


def _denoised_from(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) of ``denoised = p * x + q * eps`` for ``x = alpha * clean + sigma * noise``."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    return alpha, -sigma


def _ddim(scheduler: Any) -> SamplerTable:
    """Formula (12) of arXiv 2010.02502 with eta = 0."""
    cumulative = scheduler.alphas_cumprod.double().numpy()
    timesteps = scheduler.timesteps.numpy()
    previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    after = np.where(previous >= 0, cumulative[previous], float(scheduler.final_alpha_cumprod))
    alpha, sigma = np.sqrt(cumulative[timesteps]), np.sqrt(1 - cumulative[timesteps])
    p, q = _denoised_from(scheduler.config.prediction_type, alpha, sigma)
    noise_p, noise_q = {
        "epsilon": (np.zeros_like(alpha), np.ones_like(alpha)),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }[scheduler.config.prediction_type]
    s = np.sqrt(after) * p + np.sqrt(1 - after) * noise_p
    e = np.sqrt(after) * q + np.sqrt(1 - after) * noise_q
    return _table("ddim", timesteps, (s, e, np.zeros_like(s), p, q))


def _euler(scheduler: Any) -> SamplerTable:
    """Euler's method on dx/dsigma (arXiv 2206.00364, algorithm 1 without churn), in unit-variance latents."""
    sigmas = scheduler.sigmas.double().numpy()
    return _euler_table("euler", scheduler, sigmas, sigmas[1:], np.zeros(len(sigmas) - 1))


def _euler_ancestral(scheduler: Any) -> SamplerTable:
    """Euler's method to less noise than the schedule asks for, and fresh noise up to it (k-diffusion's ancestral)."""
    sigmas = scheduler.sigmas.double().numpy()
    now, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * (now**2 - after**2) / now**2)
    down = np.sqrt(after**2 - up**2)
    return _euler_table("euler_ancestral", scheduler, sigmas, down, up, noises=len(now))


def _euler_table(
    sampler: str, scheduler: Any, sigmas: np.ndarray, after: np.ndarray, added: np.ndarray, noises: int = 0
) -> SamplerTable:
    """Steps from ``sigmas`` to ``after``, with noise of the deviations ``added`` on top."""
    now, norm = sigmas[:-1], np.sqrt(sigmas**2 + 1)
    scales = norm[1:].copy()
    scales[-1] = 1.0
    # With x = norm * sample, x has alpha = 1 and sigma = now; the UNet sees `sample`, whose alpha is 1 / norm.
    p, q = _denoised_from(scheduler.config.prediction_type, 1 / norm[:-1], now / norm[:-1])
    step = after / now
    s = (step * norm[:-1] + (1 - step) * p) / scales
    e = (1 - step) * q / scales
    initial_scale = float(scheduler.init_noise_sigma) / norm[0]
    timesteps = scheduler.timesteps.numpy()
    return _table(sampler, timesteps, (s, e, added / scales, p, q), initial_scale, scales, noises)


def _lcm(scheduler: Any) -> SamplerTable:
    """Multistep sampling of a consistency model (arXiv 2310.04378, algorithm 3), with its boundary condition."""
    timesteps = scheduler.timesteps.numpy()
    cumulative = scheduler.alphas_cumprod.double().numpy()
    alpha, sigma = np.sqrt(cumulative[timesteps]), np.sqrt(1 - cumulative[timesteps])
    skip, out = (
        np.array(scalings)
        for scalings in zip(*map(scheduler.get_scalings_for_boundary_condition_discrete, timesteps), strict=True)
    )
    p, q = _denoised_from(scheduler.config.prediction_type, alpha, sigma)
    p, q = out * p + skip, out * q
    # What the next step begins with: its noise level; after the last step, which adds none, the clean latents.
    following = np.append(cumulative[timesteps[1:]], 1.0)
    keep, added = np.sqrt(following), np.sqrt(1 - following)
    return _table("lcm", timesteps, (keep * p, keep * q, added, p, q), noises=len(timesteps) - 1)


def _dpmsolver(scheduler: Any) -> SamplerTable:
    """DPM-Solver++ (2M) of arXiv 2211.01095, with diffusers' rules for where the order drops to one."""
    config = scheduler.config
    sigmas = scheduler.sigmas.double().numpy()  # noise to signal: sigma / alpha
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    steps = len(sigmas) - 1
    p, q = _denoised_from(config.prediction_type, alphas[:-1], (sigmas * alphas)[:-1])
    ratio = sigmas[1:] / sigmas[:-1]  # exp(-h), h the step in log signal to noise
    h = -np.log(ratio)
    keep = ratio * alphas[1:] / alphas[:-1]
    towards = alphas[1:] * (1 - ratio)
    slope = 0.5 * towards if config.solver_type == "midpoint" else alphas[1:] * ((ratio - 1) / h + 1)
    history = np.zeros(steps)
    history[1:] = -slope[1:] * h[1:] / h[:-1]
    if config.solver_order == 1:
        history[:] = 0.0
    if config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero":
        history[-1] = 0.0
    data = towards - history
    return _table("dpmsolver++", scheduler.timesteps.numpy(), (keep + data * p, data * q, history, p, q))


def _table(
    sampler: str,
    timesteps: np.ndarray,
    columns: tuple[np.ndarray, ...],
    initial_scale: float = 1.0,
    scales: np.ndarray | None = None,
    noises: int = 0,
) -> SamplerTable:
    steps = len(timesteps)
    return SamplerTable(
        sampler=sampler,
        timesteps=timesteps.astype(np.float32),
        coefficients=np.stack(columns, axis=1).astype(np.float32),
        initial_scale=initial_scale,
        scales=(np.ones(steps) if scales is None else scales).astype(np.float32),
        noises=noises,
    )
