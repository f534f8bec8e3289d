"""The noise that a model was trained with, for training on its own steps: rates, velocities, DDIM's update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from catimage_accel.executor.samplers import read_scheduler_config

V, NOISE = "v_prediction", "epsilon"
END = -1
"""The "timestep" after the last one: the end of sampling, where next to no noise is left."""


@dataclass(frozen=True, eq=False)
class VelocitySchedule:
    """A model's noise: ``sample = alpha * clean + sigma * noise``, ``v = alpha * noise - sigma * clean``.

    ``alpha`` and ``sigma`` (timesteps + 1,) float32, by timestep, on the device of training; their last entry is that
    of ``END``. v-prediction is Salimans and Ho's (arXiv 2202.00512). ``predicted`` is what the model's UNets predict,
    v or noise ("epsilon").
    """

    alpha: Tensor
    sigma: Tensor
    config: dict[str, object]
    predicted: str = V

    @classmethod
    def of_model(
        cls, model: Path, device: torch.device | str = "cpu", accepted: Sequence[str] = (V,)
    ) -> VelocitySchedule:
        """The schedule of a diffusers folder; ValueError if its UNets predict none of ``accepted`` (v, "epsilon")."""
        from diffusers import DDIMScheduler

        config = read_scheduler_config(model)
        predicted = str(config.get("prediction_type", NOISE))
        if predicted not in accepted:
            remedy = ""
            if predicted == NOISE:
                remedy = ". Fine-tune a copy that says v_prediction with `catimage distill finetune` first"
            raise ValueError(
                f"{model / 'scheduler'}: prediction_type is {predicted!r}; accepted: {', '.join(accepted)}{remedy}"
            )
        scheduler = DDIMScheduler.from_config(config)
        cumulative = torch.cat([scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double().view(1)])
        alpha, sigma = cumulative.sqrt().float(), (1 - cumulative).sqrt().float()
        return cls(alpha.to(device), sigma.to(device), config, predicted)

    @property
    def timesteps(self) -> int:
        """How many timesteps the model was trained on."""
        return len(self.alpha) - 1

    def rates(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``timestep`` (n,), ``END`` included: float32 (n, 1, 1, 1)."""
        return self.alpha[timestep].view(-1, 1, 1, 1), self.sigma[timestep].view(-1, 1, 1, 1)

    def velocity(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The v that ``prediction``, a UNet's output for ``sample`` at ``timestep`` (n,), stands for."""
        if self.predicted == V:
            return prediction
        alpha, sigma = self.rates(timestep)
        return (prediction - sigma * sample) / alpha

    def grid(self, steps: int) -> Tensor:
        """The timesteps that DDIM visits in ``steps`` steps, with ``END`` behind them: int64 (steps + 1,)."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            raise ValueError(f"steps is {steps}, for which diffusers makes {len(scheduler.timesteps)}; take another")
        if int(scheduler.timesteps.max()) >= self.timesteps:
            raise ValueError(f"steps is {steps}, which begin beyond timestep {self.timesteps - 1}; take fewer")
        return torch.cat([scheduler.timesteps.long(), torch.tensor([END])]).to(self.alpha.device)

    def after(self, steps: int) -> Tensor:
        """Where DDIM's update leads from each of those timesteps: int64 (steps,).

        As in diffusers always equally far, which is not the next timestep of every spacing.
        """
        return (self.grid(steps)[:-1] - self.timesteps // steps).clamp(min=END)

    def check_targets(self, steps: int) -> None:
        """ValueError if what a student is to predict in one of so many DDIM steps would be divided by zero."""
        now, after = self.grid(steps)[:-1], self.after(steps)
        still, blind = self.alpha[now] == self.alpha[after], self.alpha[now] == 0
        if still.any():
            raise ValueError(
                f"the scheduler config's timestep_spacing is {self.config.get('timestep_spacing', 'leading')!r}, with "
                f"which one of {steps} DDIM steps stands still, at timestep {int(now[still][0])}: a student has "
                "nothing to learn of it; accepted: 'trailing'"
            )
        if self.predicted == NOISE and blind.any():
            raise ValueError(
                f"the scheduler config's prediction_type is {NOISE!r}, but at timestep {int(now[blind][0])} there is "
                f"nothing but noise; accepted: {V}, or rescale_betas_zero_snr false"
            )


def clean_from(sample: Tensor, velocity: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that ``velocity`` predicts."""
    return alpha * sample - sigma * velocity


def ddim_step(sample: Tensor, velocity: Tensor, now: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """DDIM's update (arXiv 2010.02502, eta = 0) from the rates ``now`` to those ``after``."""
    alpha, sigma = now
    noise = sigma * sample + alpha * velocity
    return after[0] * clean_from(sample, velocity, alpha, sigma) + after[1] * noise
