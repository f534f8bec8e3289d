"""One training loop for every part of the zoo: bf16 compute, float32 weights, EMA, resume after a kill.

Weight matrices, convolutions included, are trained by Muon (Jordan et al., 2024; scaled to AdamW's update
size, arXiv 2502.16982), all else, embeddings too, by AdamW.

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
from safetensors import safe_open
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


# Plain matrix products: at these lengths the backward pass of torch's fused attention is several times slower on a CPU.
TRAINING_ATTENTION = "eager"
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")

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
        # convolutions are kept as matrices (out, in * height * width), the shape that Muon takes
        self.master = [
            (p.detach().flatten(1) if p.ndim > 2 else p.detach()).to(device, torch.float32, copy=True) for _, p in named
        ]
        self.ema = [p.clone() for p in self.master]
        self.model = model.to(device, torch.bfloat16)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        pairs = list(zip(self.master, self.parameters, strict=True))
        matrices = [m for m, p in pairs if m.ndim == 2 and id(p) not in embeddings]
        chosen = {id(m) for m in matrices}
        rest = [m for m in self.master if id(m) not in chosen]
        decay = config.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
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
                    generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) % 2**32)
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
            master.grad = p.grad.float().view_as(master) if p.grad is not None else torch.zeros_like(master)
            p.grad = None
        nn.utils.clip_grad_norm_(self.master, self.config.clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.rate(self.step)
            optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.master, 1 - decay)
            for master, p in zip(self.master, self.parameters, strict=True):
                p.copy_(master.view_as(p))
        return loss.detach().float()

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name, float32 on the CPU."""
        averaged = zip(self.names, self.ema, self.parameters, strict=True)
        return {name: value.view_as(p).cpu() for name, value, p in averaged}

    def _save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, master, ema in zip(self.names, self.master, self.ema, strict=True):
            tensors[f"master.{name}"], tensors[f"ema.{name}"] = master.detach(), ema
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(master, {}).items():
                    tensors[f"{key}.{name}"] = value
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "config": json.dumps(asdict(self.config))}
        partial = self.checkpoint.with_suffix(".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, metadata)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        tensors = load_file(self.checkpoint)
        with safe_open(self.checkpoint, "pt") as stream:
            metadata = stream.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        owner = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, master, ema, p in zip(self.names, self.master, self.ema, self.parameters, strict=True):
                master.copy_(tensors[f"master.{name}"].view_as(master))
                ema.copy_(tensors[f"ema.{name}"].view_as(ema))
                p.copy_(master.view_as(p))
                state = {key: tensors[f"{key}.{name}"] for key in OPTIMIZER_STATE if f"{key}.{name}" in tensors}
                if state:
                    owner[id(master)].state[master] = {key: value.to(master.device) for key, value in state.items()}
