"""One run of the executor: jobs pulled, slots filled, batches stepped, finished latents decoded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catimage_accel.engines import Engine, TextState
from catimage_accel.executor.batch import Batch, Slot
from catimage_accel.executor.job import Finished, Job, Step, first_sample
from catimage_accel.executor.samplers import SamplerTable

if TYPE_CHECKING:
    from catimage_accel.executor.executor import Executor

__all__ = ["Flight", "OnStep"]

OnStep = Callable[[Step], Tensor | None]

# Finished latents are decoded as soon as this many wait for it, or after so many steps of their group. Larger batches
# gain little: a decoder's layers are big enough to keep a device busy at a few images.
DECODE_BATCH = 4
DECODE_PATIENCE = 4


@dataclass(eq=False)
class _Group:
    """Jobs that share a UNet and a size: ``slots`` are stepped as ``batch``, ``waiting`` have no room yet."""

    engine: Engine
    limit: int
    slots: list[Slot] = field(default_factory=list)
    waiting: deque[Slot] = field(default_factory=deque)
    undecoded: list[Slot] = field(default_factory=list)
    steps_since_finish: int = 0
    batch: Batch | None = None
    empty: TextState | None = None

    def rebuilt(self) -> Batch:
        """The batch of the current slots, with waiting ones moved into free places."""
        if self.batch is not None:
            if not self.waiting or len(self.slots) >= self.limit:
                return self.batch
            self.batch.scatter()
        while self.waiting and len(self.slots) < self.limit:
            self.slots.append(self.waiting.popleft())
        if self.empty is None and any(slot.guided for slot in self.slots):
            self.empty = self.engine.encode_prompts([""])[0]
        self.batch = Batch(self.engine, self.slots, self.empty)
        return self.batch

    @property
    def idle(self) -> bool:
        return not (self.slots or self.waiting or self.undecoded)


class Flight:
    """The state of one :meth:`Executor.run`; iterate over :meth:`finished`."""

    def __init__(self, executor: Executor, jobs: Iterable[Job], on_step: OnStep | None) -> None:
        self._executor = executor
        self._jobs: Iterator[Job] | None = iter(jobs)
        self._jobs_error: Exception | None = None
        self._on_step = on_step
        self._groups: dict[tuple[int, torch.Size], _Group] = {}
        self._finished: deque[Finished] = deque()

    def finished(self) -> Iterator[Finished]:
        while True:
            self._pull()
            yield from self._drain()
            if not self._groups and self._jobs is None:
                break
            for key, group in list(self._groups.items()):
                self._advance(group)
                if group.idle:
                    del self._groups[key]
                yield from self._drain()
        if self._jobs_error is not None:
            raise self._jobs_error

    def _drain(self) -> Iterator[Finished]:
        while self._finished:
            yield self._finished.popleft()

    def _pull(self) -> None:
        """Takes jobs on until every group that is asked for has its slots filled, or a batch's worth has to wait.

        Looking a batch ahead keeps the other groups fed when many jobs of one group come in a row.
        """
        limit = self._executor.max_batch
        taken: list[tuple[Job, Engine, SamplerTable, Tensor, float]] = []
        places: dict[tuple[int, torch.Size], int] = {}
        waiting = sum(len(group.waiting) for group in self._groups.values())
        while self._jobs is not None and waiting < limit and not self._finished:
            try:
                job = next(self._jobs)
            except StopIteration:
                self._jobs = None
                break
            except Exception as error:
                self._jobs, self._jobs_error = None, error
                break
            started = time.perf_counter()
            try:
                engine, table = self._executor.prepare(job.candidate)
                sample = first_sample(job, engine, table)
            except Exception as error:
                self._fail(job, started, error)
                continue
            taken.append((job, engine, table, sample, started))
            key = (id(engine), sample.shape)
            if key not in places:
                group = self._groups.setdefault(key, _Group(engine, limit))
                places[key] = group.limit - len(group.slots) - len(group.waiting)
            places[key] -= 1
            waiting += places[key] < 0
        for engine in dict.fromkeys(engine for _, engine, _, _, _ in taken):
            self._encode(engine, [entry for entry in taken if entry[1] is engine])

    def _encode(self, engine: Engine, taken: list[tuple[Job, Engine, SamplerTable, Tensor, float]]) -> None:
        try:
            texts = engine.encode_prompts([job.prompt for job, *_ in taken])
        except Exception as error:
            if len(taken) == 1:
                self._fail(taken[0][0], taken[0][4], error)
            else:
                for entry in taken:
                    self._encode(engine, [entry])
            return
        for (job, _, table, sample, started), text in zip(taken, texts, strict=True):
            interval = job.candidate.options.get("deepcache_interval", 1)
            slot = Slot(job, table, text, sample, job.candidate.guidance_scale, interval, started=started)
            self._groups[id(engine), sample.shape].waiting.append(slot)

    def _advance(self, group: _Group) -> None:
        """One step of the group's batch, then what follows from it."""
        if group.slots or group.waiting:
            group.steps_since_finish += 1
            try:
                batch = group.rebuilt()
                batch.step()
            except Exception as error:
                self._advance_one_by_one(group, error)
            else:
                self._report(batch)
                if batch.finishing:
                    batch.scatter()
                    self._collect(group)
        hurry = not group.slots or group.steps_since_finish >= DECODE_PATIENCE
        if len(group.undecoded) >= DECODE_BATCH or (group.undecoded and hurry):
            slots, group.undecoded = group.undecoded, []
            for vae in dict.fromkeys(slot.job.candidate.vae for slot in slots):
                self._decode(group.engine, vae, [slot for slot in slots if slot.job.candidate.vae == vae])

    def _advance_one_by_one(self, group: _Group, error: Exception) -> None:
        """After a failed step: the same step for every slot by itself, so that only those at fault fail.

        If none is, the batch was too much as a whole (memory), and the group goes on with half as many slots.
        """
        if group.batch is not None:
            group.batch.scatter()
            group.batch = None
        slots, group.slots = group.slots, []
        for slot in slots:
            try:
                if len(slots) == 1:
                    raise error
                single = Batch(group.engine, [slot], group.empty)
                single.step()
            except Exception as own_error:
                self._fail(slot.job, slot.started, own_error)
                continue
            self._report(single)
            single.scatter()
            group.slots.append(slot)
        if slots and len(group.slots) == len(slots):
            group.limit = max(1, len(slots) // 2)
        self._collect(group)
        group.waiting.extendleft(reversed(group.slots[group.limit :]))
        del group.slots[group.limit :]

    def _collect(self, group: _Group) -> None:
        """Moves slots without a step left to the decoder's queue."""
        done = [slot for slot in group.slots if slot.remaining == 0]
        if done:
            if not group.undecoded:
                group.steps_since_finish = 0
            group.undecoded.extend(done)
        group.slots = [slot for slot in group.slots if slot.remaining]
        group.batch = None

    def _report(self, batch: Batch) -> None:
        if self._on_step is None:
            return
        for index, slot in enumerate(batch.slots):
            done = slot.step - 1
            scale = float(slot.table.scales[done])
            step = Step(slot.job, done, len(slot.table), float(slot.table.timesteps[done]), batch.sample[index] * scale)
            replaced = self._on_step(step)
            if replaced is None:
                continue
            if replaced.shape != step.latents.shape:
                raise ValueError(
                    f"on_step returned latents of shape {tuple(replaced.shape)}; accepted: {tuple(step.latents.shape)}"
                )
            with torch.inference_mode():
                batch.sample[index] = replaced.to(batch.sample) / scale

    def _decode(self, engine: Engine, vae: str, slots: list[Slot]) -> None:
        """Decodes together; if that fails, one by one, so that only those at fault have no image."""
        try:
            with torch.inference_mode():
                images = to_bytes(engine.decode(torch.stack([slot.sample for slot in slots]), vae))
        except Exception as error:
            for slot in slots:
                if len(slots) == 1:
                    self._fail(slot.job, slot.started, error, slot.sample.clone())
                else:
                    self._decode(engine, vae, [slot])
            return
        for slot, image in zip(slots, images.cpu().numpy(), strict=True):
            milliseconds = (time.perf_counter() - slot.started) * 1000
            self._finished.append(Finished(slot.job.key, slot.job, image, milliseconds, slot.sample.clone()))

    def _fail(self, job: Job, started: float, error: Exception, latents: Tensor | None = None) -> None:
        milliseconds = (time.perf_counter() - started) * 1000
        self._finished.append(Finished(job.key, job, None, milliseconds, latents, error))


def to_bytes(images: Tensor) -> Tensor:
    """uint8 (n, height, width, 3) of (n, 3, height, width) in [-1, 1]; rounds as diffusers' image processor does."""
    return (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).contiguous()
