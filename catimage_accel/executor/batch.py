"""Slots (one image in flight each) and the batch that steps those which share a UNet and a size together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from catimage_accel.engines import DeepFeatures, Engine, TextState
from catimage_accel.engines.deepcache import runs_whole
from catimage_accel.executor.job import Job
from catimage_accel.executor.samplers import SamplerTable
from catimage_accel.kernels.guided_step import guided_step

__all__ = ["Batch", "Slot"]


@dataclass(eq=False)
class Slot:
    """One image in flight: its sample, where it stands in its own table, and what its last step left behind.

    ``sample`` and ``history`` (the last step's denoised latents) are float32 (C, h, w); ``noise`` (table.noises, C, h,
    w) is what a sampler adds after its steps, None for those that add none; ``deep`` holds one or, with guidance, two
    rows of deep features.
    """

    job: Job
    table: SamplerTable
    text: TextState
    sample: Tensor
    guidance_scale: float
    deepcache_interval: int = 1
    guidance_rescale: float = 0.0
    noise: Tensor | None = None
    step: int = 0
    history: Tensor | None = None
    deep: Tensor | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def remaining(self) -> int:
        return len(self.table) - self.step

    @property
    def whole(self) -> bool:
        """Whether the next step recomputes the deep features."""
        return runs_whole(self.step, len(self.table), self.deepcache_interval)

    @property
    def next_noise(self) -> Tensor | None:
        """What the next step adds, None if nothing."""
        return None if self.noise is None or self.step >= len(self.noise) else self.noise[self.step]


class Batch:
    """A fixed set of slots, stepped together until the first of them is done or the set changes.

    Everything that depends only on who is in it is gathered here once: text keys and values, and the timesteps and
    coefficient rows of every step up to the first slot's last. UNet rows are the guided slots' rows for the empty
    prompt, then all slots' rows for their own.
    """

    def __init__(self, engine: Engine, slots: Sequence[Slot], empty: TextState | None, *, apart: bool = False) -> None:
        """``empty`` is the engine's ``unconditional``, needed if a slot is guided; ``apart`` calls the UNet for each
        slot by itself."""
        self._apart = apart
        self.slots = sorted(slots, key=lambda slot: not slot.guided)
        self._engine = engine
        self._guided = guided = sum(slot.guided for slot in self.slots)
        self._steps = min(slot.remaining for slot in self.slots)
        self._done = 0
        texts = [slot.text for slot in self.slots]
        self._text = engine.gather(([empty] * guided if empty is not None else []) + texts)
        self._pixels = [side * engine.scale_factor for side in self.slots[0].sample.shape[-2:]]
        self._added = self._text.added_conditions(*self._pixels)

        spans = [slice(slot.step, slot.step + self._steps) for slot in self.slots]
        timesteps = np.stack([slot.table.timesteps[span] for slot, span in zip(self.slots, spans, strict=True)], axis=1)
        rows = np.stack([slot.table.coefficients[span] for slot, span in zip(self.slots, spans, strict=True)], axis=1)
        self.timesteps = timesteps  # (steps, slots)
        row_timesteps = np.concatenate([timesteps[:, :guided], timesteps], axis=1)
        self._row_timesteps = torch.from_numpy(row_timesteps).to(engine.device)
        self._coefficients = torch.from_numpy(rows).to(engine.device)
        self._uses_third = bool(rows[..., 2].any())
        # Without guidance a scale of 1 gives `uncond + (cond - uncond)` with uncond = cond, which is exact.
        scales = [slot.guidance_scale if slot.guided else 1.0 for slot in self.slots]
        self._guidance = torch.tensor(scales, device=engine.device)
        rescales = [slot.guidance_rescale if slot.guided else 0.0 for slot in self.slots]
        self._rescale: float | Tensor = torch.tensor(rescales, device=engine.device) if any(rescales) else 0.0
        with torch.inference_mode():
            self.sample = torch.stack([slot.sample for slot in self.slots])
            zeros = torch.zeros_like(self.sample[0])
            self.history = torch.stack([zeros if slot.history is None else slot.history for slot in self.slots])
        self._deep = self._gather_deep() if any(slot.deepcache_interval > 1 for slot in self.slots) else None

    @property
    def finishing(self) -> bool:
        """Whether a slot has no step left, so that the batch can't go on as it is."""
        return self._done == self._steps

    @torch.inference_mode()
    def step(self) -> None:
        """One denoising step of every slot. If it raises, no slot has moved."""
        guided, done = self._guided, self._done
        sample = torch.cat([self.sample[:guided], self.sample]) if guided else self.sample
        timesteps = self._row_timesteps[done]
        if self._apart:
            noise = self._denoise_apart(sample, timesteps)
        else:
            if self._deep is not None:
                self._deep.refresh = self._refreshed_rows()
            noise = self._engine.denoise(sample, timesteps, self._text, self._added, deep=self._deep)
        third = self._third() if self._uses_third else None
        cond = noise[guided:]
        uncond = torch.cat([noise[:guided], cond[guided:]]) if 0 < guided < len(cond) else noise[:guided]
        self.sample, self.history = guided_step(
            self.sample, cond, uncond if guided else None, self._coefficients[done],
            third, guidance_scale=self._guidance, guidance_rescale=self._rescale,
        )  # fmt: skip
        self._done += 1
        for slot in self.slots:
            slot.step += 1

    def _third(self) -> Tensor:
        """What ``h`` of each row multiplies: the last step's denoised latents, or noise."""
        noises = [(index, noise) for index, slot in enumerate(self.slots) if (noise := slot.next_noise) is not None]
        if not noises:
            return self.history
        third = self.history.clone()
        for index, noise in noises:
            third[index] = noise
        return third

    def _denoise_apart(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        noise = torch.empty_like(sample)
        for index, slot in enumerate(self.slots):
            rows = self._rows_of(index)
            deep = None
            if self._deep is not None:
                known = self._deep.features
                refresh = None if slot.whole else ()
                deep = DeepFeatures(None if known is None else known[rows], refresh)
            text = self._text.rows(tuple(rows))
            added = text.added_conditions(*self._pixels)
            noise[rows] = self._engine.denoise(sample[rows], timesteps[rows], text, added, deep=deep)
            if self._deep is not None and deep is not None and deep.features is not None:
                if self._deep.features is None:
                    self._deep.features = deep.features.new_zeros((len(sample), *deep.features.shape[1:]))
                self._deep.features[rows] = deep.features
        return noise

    @torch.inference_mode()
    def scatter(self) -> None:
        """Hands every slot its own state back, so that it can join another batch."""
        for index, slot in enumerate(self.slots):
            slot.sample, slot.history = self.sample[index], self.history[index]
            if self._deep is not None and self._deep.features is not None:
                slot.deep = self._deep.features[self._rows_of(index)]

    def _rows_of(self, index: int) -> list[int]:
        row = self._guided + index
        return [index, row] if index < self._guided else [row]

    @torch.inference_mode()
    def _gather_deep(self) -> DeepFeatures:
        known = next((slot.deep for slot in self.slots if slot.deep is not None), None)
        if known is None:
            return DeepFeatures()
        features = known.new_zeros((self._guided + len(self.slots), *known.shape[1:]))
        for index, slot in enumerate(self.slots):
            if slot.deep is not None:
                features[self._rows_of(index)] = slot.deep
        return DeepFeatures(features)

    def _refreshed_rows(self) -> tuple[int, ...] | None:
        fresh = [index for index, slot in enumerate(self.slots) if slot.whole]
        if len(fresh) == len(self.slots):
            return None
        return tuple(sorted(row for index in fresh for row in self._rows_of(index)))
