"""Jobs in flight: slots filled, batches stepped, finished latents decoded; one step of every batch at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from catimage_accel.engines import Engine, TextState
from catimage_accel.executor.batch import Batch, Slot
from catimage_accel.executor.job import Finished, Job, Step, first_sample
from catimage_accel.executor.samplers import SamplerTable

if TYPE_CHECKING:
    from catimage_accel.executor.executor import Executor

__all__ = ["Flight", "OnStep", "out_of_memory"]

OnStep = Callable[[Step], Tensor | None]

# Finished latents are decoded as soon as this many wait for it, or after so many steps of their group. Larger batches
# gain little: a decoder's layers are big enough to keep a device busy at a few images.
DECODE_BATCH = 4
DECODE_PATIENCE = 4
# What runtimes that have no exception of their own for it say (torch's CPU allocator, TensorRT, ONNX Runtime).
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc", "bad allocation")


@dataclass(eq=False)
class _Entry:
    """A job that was taken on and whose prompt is not encoded yet."""

    job: Job
    engine: Engine
    table: SamplerTable
    sample: Tensor
    started: float


@dataclass(eq=False)
class _Group:
    """Jobs that share a UNet and a size: ``slots`` are stepped as ``batch``, ``waiting`` have no room yet.

    Jobs in ``taken`` are encoded, with the other groups' of the engine, before the next step.
    """

    engine: Engine
    limit: int
    reproducible: bool
    taken: list[_Entry] = field(default_factory=list)
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
        self.batch = Batch(self.engine, self.slots, self.empty, apart=self.apart)
        return self.batch

    @property
    def apart(self) -> bool:
        """Whether images are stepped and decoded one by one, so that none changes another's bits."""
        return self.reproducible and not self.engine.batch_invariant

    @property
    def idle(self) -> bool:
        return not (self.taken or self.slots or self.waiting or self.undecoded)

    @property
    def began(self) -> float:
        """When the oldest of its images was taken on; those that only wait for the decode don't count."""
        return min((slot.started for slot in (*self.slots, *self.waiting)), default=float("inf"))

    @property
    def without_room(self) -> int:
        return max(0, len(self.taken) + len(self.waiting) - max(0, self.limit - len(self.slots)))

    def remove(self, is_gone: Callable[[Job], bool]) -> None:
        """Forgets the jobs for which ``is_gone``; the others' state is kept."""
        if any(is_gone(slot.job) for slot in self.slots):
            if self.batch is not None:
                self.batch.scatter()
                self.batch = None
            self.slots = [slot for slot in self.slots if not is_gone(slot.job)]
        self.taken = [entry for entry in self.taken if not is_gone(entry.job)]
        self.waiting = deque(slot for slot in self.waiting if not is_gone(slot.job))
        self.undecoded = [slot for slot in self.undecoded if not is_gone(slot.job)]


class Flight:
    """The jobs that an :class:`Executor` has in flight: taken on with :meth:`take`, drawn by :meth:`advance`.

    For callers whose jobs come one by one while others are drawn; :meth:`Executor.run` is made of it. Errors are as
    told there. Not thread-safe, and the only flight of its executor while it lasts.
    """

    def __init__(self, executor: Executor, on_step: OnStep | None = None) -> None:
        self._executor = executor
        self._on_step = on_step
        self._groups: dict[tuple[int, torch.Size], _Group] = {}
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
            engine, table = self._executor.prepare(job.candidate)
            sample = first_sample(job, engine, table)
        except Exception as error:
            self._fail(job, started, error)
            return
        key = (id(engine), sample.shape)
        if key not in self._groups:
            limit = self._executor.batch_limit(engine, sample.shape)
            self._groups[key] = _Group(engine, limit, self._executor.reproducible)
        self._groups[key].taken.append(_Entry(job, engine, table, sample, started))

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
        if self._executor.reproducible:  # text encoders are PyTorch's, whose bits depend on the batch
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

    def _encode(self, taken: list[_Entry]) -> None:
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
                candidate.guidance_rescale, started=entry.started,
            )  # fmt: skip
            self._groups[id(entry.engine), entry.sample.shape].waiting.append(slot)

    def _advance(self, group: _Group, *, step: bool) -> None:
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
                self._executor.lower_batch_limit(group.engine, slots[0].sample.shape, group.limit)
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
