"""One training loop for every part of the zoo: bf16 compute, float32 weights, EMA, resume after a kill.

A run is a function of its seed: the random numbers of step ``n`` come from ``(seed, n)`` alone, so a
resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. ``steps`` may be changed on resume; the learning rate's decay follows it.

    ``decay_share`` is the last part of the run over which the rate falls linearly to zero.
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

    def rate(self, step: int) -> float:
        decay_from = self.steps * (1 - self.decay_share)
        fall = (self.steps - step) / max(1.0, self.steps - decay_from)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), max(0.0, fall))


LossFn = Callable[[int, torch.Generator], torch.Tensor]


class Trainer:
    """Trains ``model`` (moved to ``device`` in bf16) and keeps float32 master weights and their EMA.

    ``loss_fn(step, generator)`` returns the loss of one batch; ``generator`` is a CPU generator seeded by
    the run's seed and the step.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, folder: Path, device: torch.device, title: str):
        self.config, self.folder, self.title = config, folder, title
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.master = [p.detach().to(device, torch.float32, copy=True) for _, p in named]
        self.ema = [p.clone() for p in self.master]
        self.model = model.to(device, torch.bfloat16)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.master, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self, loss_fn: LossFn) -> None:
        """Train up to ``config.steps``; Ctrl-C writes a checkpoint and raises KeyboardInterrupt."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"),
        )  # fmt: skip
        with Progress(*columns) as progress, (self.folder / "loss.jsonl").open("a") as log:
            bar = progress.add_task(self.title, total=self.config.steps, completed=self.step, loss="-")
            since, began, recent = self.seconds, time.monotonic(), []
            try:
                while self.step < self.config.steps:
                    generator = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
                    recent.append(self._one_step(loss_fn(self.step, generator)))
                    self.step += 1
                    self.seconds = since + time.monotonic() - began
                    if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                        loss = torch.stack(recent).mean().item()
                        recent = []
                        row = {"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds, 1)}
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                        progress.update(bar, completed=self.step, loss=f"{loss:.4f}")
                    if self.step % self.config.checkpoint_every == 0:
                        self._save()
            finally:
                self._save()

    def _one_step(self, loss: torch.Tensor) -> torch.Tensor:
        loss.backward()
        for master, p in zip(self.master, self.parameters, strict=True):
            master.grad = p.grad.float() if p.grad is not None else torch.zeros_like(master)
            p.grad = None
        nn.utils.clip_grad_norm_(self.master, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.master, 1 - decay)
            torch._foreach_copy_(self.parameters, self.master)
        return loss.detach().float()

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name, float32 on the CPU."""
        return {name: value.cpu() for name, value in zip(self.names, self.ema, strict=True)}

    def _save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, master, ema in zip(self.names, self.master, self.ema, strict=True):
            state = self.optimizer.state.get(master, {})
            tensors[f"master.{name}"], tensors[f"ema.{name}"] = master.detach(), ema
            if state:
                tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "config": json.dumps(asdict(self.config))}
        partial = self.checkpoint.with_suffix(".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, metadata)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        from safetensors import safe_open

        tensors = load_file(self.checkpoint)
        with safe_open(self.checkpoint, "pt") as stream:
            metadata = stream.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        with torch.no_grad():
            for name, master, ema, p in zip(self.names, self.master, self.ema, self.parameters, strict=True):
                master.copy_(tensors[f"master.{name}"])
                ema.copy_(tensors[f"ema.{name}"])
                p.copy_(master)
                if f"exp_avg.{name}" in tensors:
                    self.optimizer.state[master] = {
                        "step": torch.tensor(float(self.step), device=master.device),
                        "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
                    }
