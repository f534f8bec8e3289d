"""How long a training run is and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from catimage_accel.engines.machine import bfloat16_arithmetic

# What may differ between a checkpoint's settings and those of the run that goes on from it.
MAY_CHANGE = ("steps", "checkpoint_every", "log_every", "validate_every")

# What a model may compute in.
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is arithmetic there. Processors without it imitate it, many times slower than float32."""
    return device.type != "cpu" or bfloat16_arithmetic()


# Plain matrix products: at these lengths the backward pass of torch's fused attention is several times slower on a CPU.
TRAINING_ATTENTION = "eager"


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. ``steps`` may be changed on resume; the learning rate's decay follows it.

    One step takes ``accumulation`` batches of ``batch_size`` on every process. ``decay_share`` is the last part of the
    run over which the rate falls linearly to zero. ``precision`` is what the model computes in, "bf16" or "fp32"; its
    master weights are float32 either way. ``validate_every`` 0 means never.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    decay_share: float = 0.35
    ema_decay: float = 0.998
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 250
    log_every: int = 20
    validate_every: int = 0
    accumulation: int = 1
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; accepted: {', '.join(PRECISIONS)}")
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a whole number from 1")

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        decay_from = self.steps * (1 - self.decay_share)
        fall = (self.steps - step) / max(1.0, self.steps - decay_from)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), max(0.0, fall))
