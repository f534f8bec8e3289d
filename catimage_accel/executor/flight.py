"""Jobs in flight: slots filled, batches stepped, finished latents decoded; one step of every batch at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from catimage_accel.engines import Engine
from catimage_accel.executor.batch import Batch, Slot
from catimage_accel.executor.group import Entry, Group
from catimage_accel.executor.job import Finished, Job, Step, first_sample, step_noise
from catimage_accel.executor.samplers import SamplerTable

if TYPE_CHECKING:
    from catimage_accel.candidate import Candidate

__all__ = ["Flight", "OnStep", "out_of_memory", "to_bytes"]

OnStep = Callable[[Step], Tensor | None]

# Finished latents are decoded as soon as this many wait for it, or after so many steps of their group. Larger batches
# gain little: a decoder's layers are big enough to keep a device busy at a few images.
DECODE_BATCH = 4
DECODE_PATIENCE = 4
# What runtimes that have no exception of their own for it say (torch's CPU allocator, TensorRT, ONNX Runtime).
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc", "bad allocation")


class Models(Protocol):
    """What draws, and how many images at once: an ``Executor``, as its flights see it."""

    reproducible: bool

    def prepare(self, candidate: Candidate) -> tuple[Engine, SamplerTable]: ...

    def batch_limit(self, engine: Engine, shape: torch.Size) -> int: ...

    def lower_batch_limit(self, engine: Engine, shape: torch.Size, limit: int) -> None: ...


class Flight:
    """The jobs that an ``Executor`` has in flight: taken on with :meth:`take`, drawn by :meth:`advance`.

    For callers whose jobs come one by one while others are drawn; ``Executor.run`` is made of it. Errors are as
    told there. Not thread-safe, and the only flight of its executor while it lasts.
    """

    def __init__(self, models: Models, on_step: OnStep | None = None) -> None:
        self._models = models
        self._on_step = on_step
        self._groups: dict[tuple[int, torch.Size], Group] = {}
        self._finished: deque[Finished] = deque()

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing finished is left to hand out."""
        return not self._groups and not self._finished

    @property
    def without_room(self) -> int:
        """Jobs that were taken on and find no free slot at the next step."""
        return sum(group.without_room for group in self._groups.values())

    @property
    def has_finished(self) -> bool:
        """Whether :meth:`advance` would hand something out before it steps."""
        return bool(self._finished)

    def take(self, job: Job) -> None:
        """Takes the job on: its noise is drawn, and its model loaded if it was not. It is in the next step's batch if
        that has room. A job that can't be drawn comes out of :meth:`advance` with its error."""
        started = time.perf_counter()
        try:
            engine, table = self._models.prepare(job.candidate)
            sample = first_sample(job, engine, table)
            noise = step_noise(job, engine, table, sample.shape)
        except Exception as error:
            self._fail(job, started, error)
            return
        key = (id(engine), sample.shape)
        if key not in self._groups:
            limit = self._models.batch_limit(engine, sample.shape)
            self._groups[key] = Group(engine, limit, self._models.reproducible)
        self._groups[key].taken.append(Entry(job, engine, table, sample, noise, started))

    def cancel(self, key: Any) -> None:
        """Forgets the job of this key, wherever it stands: its slot is free at the next step, and no outcome of it is
        handed out."""
        for group_key, group in list(self._groups.items()):
            group.remove(lambda job: bool(job.key == key))
            if group.idle:
                del self._groups[group_key]
        self._finished = deque(finished for finished in self._finished if finished.key != key)

    def advance(self) -> Iterator[Finished]:
        """Steps the batch of the oldest image once, and hands out what is finished; to be iterated to its end."""
        yield from self._drain()
        taken = [entry for group in self._groups.values() for entry in group.taken]
        for group in self._groups.values():
            group.taken = []
        if self._models.reproducible:  # text encoders are PyTorch's, whose bits depend on the batch
            for entry in taken:
                self._encode([entry])
        else:
            for engine in dict.fromkeys(entry.engine for entry in taken):
                self._encode([entry for entry in taken if entry.engine is engine])
        if self._groups:
            # First come, first served: what is taken on later may ride along, but never holds an older image up.
            oldest = min(self._groups.values(), key=lambda group: group.began)
            for key, group in list(self._groups.items()):
                self._advance(group, step=group is oldest)
                if group.idle:
                    self._groups.pop(key, None)
            yield from self._drain()

    def _drain(self) -> Iterator[Finished]:
        while self._finished:
            yield self._finished.popleft()

    def _encode(self, taken: list[Entry]) -> None:
        try:
            texts = taken[0].engine.encode_prompts([entry.job.prompt for entry in taken])
        except Exception as error:
            if len(taken) == 1:
                self._fail(taken[0].job, taken[0].started, error)
            else:
                for entry in taken:
                    self._encode([entry])
            return
        for entry, text in zip(taken, texts, strict=True):
            candidate = entry.job.candidate
            interval = candidate.options.get("deepcache_interval", 1)
            slot = Slot(
                entry.job, entry.table, text, entry.sample, candidate.guidance_scale, interval,
                candidate.guidance_rescale, entry.noise, started=entry.started,
            )  # fmt: skip
            self._groups[id(entry.engine), entry.sample.shape].waiting.append(slot)

    def _advance(self, group: Group, *, step: bool) -> None:
        """With ``step``, one step of the group's batch; then the decode of what is finished, if it is time for it."""
        if step and (group.slots or group.waiting):
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
        hurry = not step or not group.slots or group.steps_since_finish >= DECODE_PATIENCE
        if len(group.undecoded) >= DECODE_BATCH or (group.undecoded and hurry):
            slots, group.undecoded = group.undecoded, []
            for vae in dict.fromkeys(slot.job.candidate.vae for slot in slots):
                alike = [slot for slot in slots if slot.job.candidate.vae == vae]
                for part in [[slot] for slot in alike] if group.apart else [alike]:
                    self._decode(group.engine, vae, part)

    def _advance_one_by_one(self, group: Group, error: Exception) -> None:
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
                single = Batch(group.engine, [slot], group.empty, apart=group.apart)
                single.step()
            except Exception as own_error:
                self._fail(slot.job, slot.started, own_error)
                continue
            self._report(single)
            single.scatter()
            group.slots.append(slot)
        if slots and len(group.slots) == len(slots):
            group.limit = max(1, len(slots) // 2)
            if out_of_memory(error):
                self._models.lower_batch_limit(group.engine, slots[0].sample.shape, group.limit)
        self._collect(group)
        group.waiting.extendleft(reversed(group.slots[group.limit :]))
        del group.slots[group.limit :]

    def _collect(self, group: Group) -> None:
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
            step = Step(
                slot.job, done, len(slot.table), float(slot.table.timesteps[done]), batch.sample[index] * scale,
                batch.history[index], len(batch.slots),
            )  # fmt: skip
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


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_WORDS)


def to_bytes(images: Tensor) -> Tensor:
    """uint8 (n, height, width, 3) of (n, 3, height, width) in [-1, 1]; rounds as diffusers' image processor does."""
    return (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).contiguous()
