"""Records what a candidate's UNet is really given, by drawing prompts with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catimage_accel.candidate import OWN_VAE, Candidate
from catimage_accel.engines import DeepFeatures, Engine, TextBatch, TextState
from catimage_accel.engines.protocol import ADDED_CONDITIONS
from catimage_accel.executor import Executor, Job
from catimage_accel.executor.samplers import SamplerTable
from catimage_accel.quantize import UNetInputs
from catimage_accel.scoring import image_seed

__all__ = ["record_inputs", "spread_rows"]

IMAGES_TOGETHER = 8


def record_inputs(
    candidate: Candidate,
    prompts: Sequence[str],
    rows: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    resolve_model: Callable[[str], Path] | None = None,
    resolve_lora: Callable[[str], Path] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> UNetInputs:
    """``rows`` of the inputs that the candidate's UNet is given over all steps of drawing ``prompts``.

    They are drawn in float32, with the candidate's own sampler, by diffusers' own modules. The rows, those of the empty
    prompt that guidance needs included, are the same ones every time and spread evenly over steps and prompts; fewer
    come back if there are no more. They are in the order of the steps. ``advance`` is told of images drawn.

    Raises ValueError without prompts or rows, for a quantized candidate and for inputs with NaN or infinity, and what
    the executor raises for a candidate that can't be drawn.
    """
    prompts = list(dict.fromkeys(prompts))
    if not prompts:
        raise ValueError("prompts is empty; accepted: 1 or more prompts to draw, such as those the model is used for")
    if rows < 1:
        raise ValueError(f"rows is {rows}; accepted: 1 or more")
    if candidate.quantization is not None:
        raise ValueError(f"candidate {candidate.name!r} is quantized; accepted: the one it was made from")
    plain = replace(candidate, engine="eager", precision="fp32")
    executor = _RecordingExecutor(device, resolve_model, resolve_lora)
    executor.check(plain)
    rows_an_image = 2 if candidate.guidance_scale > 1 else 1
    steps = len(executor.prepare(plain)[1])  # diffusers makes one more than asked for now and then
    wanted = spread_rows(steps, len(prompts) * rows_an_image, rows)
    recorded: list[tuple[int, int, UNetInputs]] = []
    for start in range(0, len(prompts), IMAGES_TOGETHER):
        some = prompts[start : start + IMAGES_TOGETHER]
        first = start * rows_an_image
        executor.recorder.begin([
            [row - first for row in step if first <= row < first + len(some) * rows_an_image] for step in wanted
        ])  # fmt: skip
        jobs = [Job(text, plain, torch.Generator().manual_seed(image_seed(seed, text))) for text in some]
        for finished in executor.run(jobs):
            if error := executor.recorder.error or finished.error:
                raise error
            advance(1)
        recorded += [(step, first, inputs) for step, inputs in executor.recorder.taken]
    recorded.sort(key=lambda one: one[:2])
    return UNetInputs.joined([inputs for _, _, inputs in recorded])


def spread_rows(steps: int, rows_a_step: int, number: int) -> list[list[int]]:
    """Which of ``rows_a_step`` rows to take at each step, so that ``number`` are spread evenly over steps and rows.

    Any two steps, and any two rows over all steps, differ by one at most; all are taken if there are no more.
    """
    number = min(number, steps * rows_a_step)
    order = torch.randperm(rows_a_step, generator=torch.Generator().manual_seed(0)).tolist()
    bounds = [step * number // steps for step in range(steps + 1)]
    return [sorted(order[place % rows_a_step] for place in range(first, last)) for first, last in pairwise(bounds)]


class _Recorder:
    """An engine that keeps some rows of what it is asked to denoise, and leaves the work to another one."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, UNetInputs]] = []
        self.error: Exception | None = None
        self._wanted: list[list[int]] = []
        self._step = 0

    def begin(self, wanted: list[list[int]]) -> None:
        """Starts again at step 0; ``wanted`` names the rows to keep of each step."""
        self.taken, self._wanted, self._step = [], wanted, 0

    def see(self, sample: Tensor, timestep: Tensor, text: TextBatch, added: Mapping[str, Tensor] | None) -> None:
        if rows := self._wanted[self._step]:
            values = [sample, timestep, text.hidden, *((added or {}).get(name) for name in ADDED_CONDITIONS)]
            inputs = UNetInputs(*(None if value is None else value[rows].float().cpu() for value in values))
            self.taken.append((self._step, inputs))
        self._step += 1


class _RecordingEngine:
    """``engine``, observed by ``recorder``."""

    def __init__(self, engine: Engine, recorder: _Recorder) -> None:
        self._engine, self._recorder = engine, recorder
        self.name, self.device, self.dtype, self.channels = engine.name, engine.device, engine.dtype, engine.channels
        self.sample_size, self.scale_factor = engine.sample_size, engine.scale_factor
        self.batch_invariant = engine.batch_invariant

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextState]:
        return self._engine.encode_prompts(prompts)

    def unconditional(self) -> TextState:
        return self._engine.unconditional()

    def gather(self, states: Sequence[TextState]) -> TextBatch:
        return self._engine.gather(states)

    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextBatch,
        added: Mapping[str, Any] | None = None,
        *,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        try:
            self._recorder.see(sample, timestep, text, added)
            return self._engine.denoise(sample, timestep, text, added, deep=deep)
        except Exception as error:
            # The executor goes on with smaller batches; the record would no longer know its rows.
            self._recorder.error = self._recorder.error or error
            raise

    def decode(self, latents: Tensor, vae: str = OWN_VAE) -> Tensor:
        # Nobody looks at the pictures.
        return latents.new_zeros(len(latents), 3, 1, 1)


class _RecordingExecutor(Executor):
    """An executor whose engines are observed."""

    def __init__(
        self,
        device: torch.device | str | None,
        resolve_model: Callable[[str], Path] | None,
        resolve_lora: Callable[[str], Path] | None,
    ) -> None:
        super().__init__(
            max_batch=IMAGES_TOGETHER, device=device, resolve_model=resolve_model, resolve_lora=resolve_lora
        )
        self.recorder = _Recorder()
        self._observed: dict[int, _RecordingEngine] = {}

    def prepare(self, candidate: Candidate) -> tuple[Engine, SamplerTable]:
        engine, table = super().prepare(candidate)
        return self._observed.setdefault(id(engine), _RecordingEngine(engine, self.recorder)), table
