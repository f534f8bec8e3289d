"""One training loop: bf16 compute, float32 weights, EMA, several processes through accelerate, resume after a kill.

Weight matrices, convolutions included, are trained by Muon (Jordan et al., 2024; scaled to AdamW's update
size, arXiv 2502.16982), all else, embeddings too, by AdamW.

A run is a function of its seed: the random numbers of batch ``n`` come from ``(seed, n)`` alone, so a
resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import GradientAccumulationPlugin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from catimage_accel.training.checkpoint import read_checkpoint, write_checkpoint
from catimage_accel.training.config import PRECISIONS, TrainConfig, computes_in_bf16
from catimage_accel.training.muon import Float32Muon
from catimage_accel.training.process import stopping_waits
from catimage_accel.training.record import LOG_FILE, begin_log, write_machine

LossFn = Callable[[int, torch.Generator], torch.Tensor]
Validate = Callable[[int], Mapping[str, float]]

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class TrainingDiverged(ValueError):
    """The loss or its gradient is no longer finite; the last checkpoint is kept."""


class Trainer:
    """Trains ``model`` (moved to ``device`` in the config's precision) and keeps float32 master weights and their EMA.

    ``loss_fn(batch, generator)`` of ``run`` returns the loss of one batch, the ``batch``-th of all processes together;
    ``generator`` is a CPU generator seeded by the run's seed and that number. Started by ``accelerate launch``, every
    process works on batches of its own; gradients are averaged for what is computed by ``trainer.forward``.

    ``recipe`` says what else the run depends on. A checkpoint in ``folder`` is gone on from if it was written with the
    same recipe, settings (but for ``config.MAY_CHANGE``) and number of processes, else ValueError names the first
    difference. ``validate(step)`` is called with the averaged weights in the model every ``validate_every`` steps, on
    the main process; what it returns is logged. ``start_weight`` is the share that the weights trained from have in the
    averaged ones, wherever those are asked for; training does not depend on it. ``some_unused`` says that a batch may
    leave parameters without a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        title: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        validate: Validate | None = None,
        start_weight: float = 0.0,
        some_unused: bool = False,
    ):
        self.config, self.folder, self.title, self.validate = config, folder, title, validate
        self.recipe = dict(recipe or {})
        self.accelerator = _accelerator(device, some_unused, title)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"{title}: no parameter of the model requires a gradient; accepted: at least 1")
        self.names = [name for name, _ in named]
        # convolutions are kept as matrices (out, in * height * width), the shape that Muon takes
        self.master = [
            (p.detach().flatten(1) if p.ndim > 2 else p.detach()).to(device, torch.float32, copy=True) for _, p in named
        ]
        self.ema = [p.clone() for p in self.master]
        self.start_weight = start_weight
        self.start = [p.clone() for p in self.master] if start_weight > 0 else []
        # Not the model's own ``to``: diffusers' warns of every change of type.
        self.model = nn.Module.to(model, device, PRECISIONS[config.precision])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = self._optimizers()
        self.step = 0
        self.seconds = 0.0
        self._whole = True  # False while a step changes the weights
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()
        alone = self.accelerator.num_processes == 1
        self.forward: nn.Module = self.model if alone else self.accelerator.prepare_model(self.model)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self, loss_fn: LossFn) -> None:
        """Train up to ``config.steps``; Ctrl-C writes a checkpoint and raises KeyboardInterrupt.

        Raises TrainingDiverged, before the weights are touched, when the loss or its gradient is not finite: the
        checkpoint before is then kept as it is. So it is after an error within the change of the weights, which
        Ctrl-C and SIGTERM wait for.
        """
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"),
        )  # fmt: skip
        main = self.accelerator.is_main_process
        if main:
            begin_log(self.folder, self.step)
            if self.step < self.config.steps:
                write_machine(self.folder, self.accelerator.device)
        with Progress(*columns, disable=not main) as progress, (self.folder / LOG_FILE).open("a") as log:
            bar = progress.add_task(self.title, total=self.config.steps, completed=self.step, loss="-")
            since, began, recent = self.seconds, time.monotonic(), []
            try:
                while self.step < self.config.steps:
                    recent.append(self._one_step(loss_fn))
                    self.seconds = since + time.monotonic() - began
                    last = self.step == self.config.steps
                    row: dict[str, float] = {}
                    if self.step % self.config.log_every == 0 or last:
                        loss = sum(recent) / len(recent)
                        recent = []
                        row = {"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds, 1)}
                        progress.update(bar, completed=self.step, loss=f"{loss:.4f}")
                    if self._validates(last):
                        row |= {"step": self.step} | self._validated()
                    if row and main:
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                    if self.step % self.config.checkpoint_every == 0:
                        self._save()
            except TrainingDiverged:
                raise
            except BaseException:
                if self._whole:
                    self._save()
                raise
            self._save()

    def _validates(self, last: bool) -> bool:
        every = self.config.validate_every
        return self.validate is not None and every > 0 and (self.step % every == 0 or last)

    def _validated(self) -> dict[str, float]:
        assert self.validate is not None
        if not self.accelerator.is_main_process:
            return {}
        with self.averaged():
            return {name: round(value, 5) for name, value in self.validate(self.step).items()}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averaged weights in it, in evaluation mode; as it was afterwards."""
        training = self.model.training
        with torch.no_grad():
            for p, averaged in zip(self.parameters, self._averages(), strict=True):
                p.copy_(averaged.view_as(p))
        try:
            yield self.model.eval()
        finally:
            self.model.train(training)
            self._to_model()

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name, float32 on the CPU."""
        averaged = zip(self.names, self._averages(), self.parameters, strict=True)
        return {name: value.view_as(p).cpu() for name, value, p in averaged}

    def _averages(self) -> Iterator[torch.Tensor]:
        if self.start_weight > 0:
            return (ema.lerp(start, self.start_weight) for ema, start in zip(self.ema, self.start, strict=True))
        return iter(self.ema)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        pairs = list(zip(self.master, self.parameters, strict=True))
        matrices = [m for m, p in pairs if m.ndim == 2 and id(p) not in embeddings]
        chosen = {id(m) for m in matrices}
        rest = [m for m in self.master if id(m) not in chosen]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        optimizers: list[torch.optim.Optimizer] = []
        if rest:
            optimizers.append(torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True))
        if matrices:
            muon = torch.optim.Muon if computes_in_bf16(matrices[0].device) else Float32Muon
            optimizers.append(muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def _one_step(self, loss_fn: LossFn) -> float:
        """One optimizer step; the mean loss of this process's batches."""
        losses = []
        processes, accumulation = self.accelerator.num_processes, self.config.accumulation
        for part in range(accumulation):
            batch = (self.step * accumulation + part) * processes + self.accelerator.process_index
            generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + batch) % 2**32)
            waiting = processes > 1 and part + 1 < accumulation
            with self.accelerator.no_sync(self.forward) if waiting else nullcontext():
                loss = loss_fn(batch, generator)
                self.accelerator.backward(loss / accumulation)
            losses.append(loss.detach().float())
        for master, p in zip(self.master, self.parameters, strict=True):
            # None, not zeros: momentum alone would move what this step has not used, Muon's by a step's whole length.
            master.grad = p.grad.float().view_as(master) if p.grad is not None else None
            p.grad = None
        norm = nn.utils.clip_grad_norm_(self.master, self.config.clip_norm)
        loss_here = torch.stack(losses).mean()
        # the norm is of the gradient averaged over all processes, so that all of them stop
        if not (torch.isfinite(norm) and (processes > 1 or torch.isfinite(loss_here))):
            raise TrainingDiverged(self._divergence(loss_here.item(), norm.item()))
        with stopping_waits():
            self._whole = False
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.config.rate(self.step)
                optimizer.step()
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.master, 1 - decay)
            self._to_model()
            self.step += 1
            self._whole = True
        return loss_here.item()

    def _divergence(self, loss: float, norm: float) -> str:
        kept = f"{self.checkpoint} holds the last good state" if self.checkpoint.exists() else "no checkpoint yet"
        return (
            f"{self.title}: at step {self.step} the loss is {loss} and its gradient's norm {norm}; {kept}. "
            f"Go on from it with a learning_rate below {self.config.learning_rate}, in a folder of its own"
        )

    @torch.no_grad()
    def _to_model(self) -> None:
        for master, p in zip(self.master, self.parameters, strict=True):
            p.copy_(master.view_as(p))

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, master, ema in zip(self.names, self.master, self.ema, strict=True):
            tensors[f"master.{name}"], tensors[f"ema.{name}"] = master.detach(), ema
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(master, {}).items():
                    tensors[f"{key}.{name}"] = value
        write_checkpoint(
            self.checkpoint, tensors, self.step, self.seconds, self.config, self.recipe,
            self.accelerator.num_processes,
        )  # fmt: skip

    def _load(self) -> None:
        tensors, self.step, self.seconds = read_checkpoint(
            self.checkpoint, self.config, self.recipe, self.accelerator.num_processes
        )
        lacking = [name for name in self.names if f"master.{name}" not in tensors]
        if lacking:
            text = f"{self.checkpoint} is of another model: it lacks {lacking[0]}; give the run another folder"
            raise ValueError(text)
        owner = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, master, ema in zip(self.names, self.master, self.ema, strict=True):
                master.copy_(tensors[f"master.{name}"].view_as(master))
                ema.copy_(tensors[f"ema.{name}"].view_as(ema))
                state = {key: tensors[f"{key}.{name}"] for key in OPTIMIZER_STATE if f"{key}.{name}" in tensors}
                if state:
                    owner[id(master)].state[master] = {key: value.to(master.device) for key, value in state.items()}
        self._to_model()


def _accelerator(device: torch.device, some_unused: bool, title: str) -> Accelerator:
    """Several processes and nothing else: not what `accelerate config` and its variables say of training."""
    found = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
    )  # fmt: skip
    if found.distributed_type not in DISTRIBUTED:
        raise ValueError(
            f"{title}: launched with {found.distributed_type.value}; accepted: processes without DeepSpeed, FSDP or "
            "Megatron-LM"
        )
    if found.num_processes > 1 and found.device.type != device.type:
        raise ValueError(
            f"{title}: device is {str(device)!r}, but the processes were launched for {found.device.type}; accepted: "
            "the same"
        )
    return found
