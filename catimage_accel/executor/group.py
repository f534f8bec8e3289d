"""Jobs that share a UNet and a size: who is stepped together, who waits for a place, who for the decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from catimage_accel.engines import Engine, TextState
from catimage_accel.executor.batch import Batch, Slot
from catimage_accel.executor.job import Job
from catimage_accel.executor.samplers import SamplerTable

__all__ = ["Entry", "Group"]


@dataclass(eq=False)
class Entry:
    """A job that was taken on and whose prompt is not encoded yet."""

    job: Job
    engine: Engine
    table: SamplerTable
    sample: Tensor
    noise: Tensor | None
    started: float


@dataclass(eq=False)
class Group:
    """Jobs that share a UNet and a size: ``slots`` are stepped as ``batch``, ``waiting`` have no room yet.

    Jobs in ``taken`` are encoded, with the other groups' of the engine, before the next step.
    """

    engine: Engine
    limit: int
    reproducible: bool
    taken: list[Entry] = field(default_factory=list)
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
            self.empty = self.engine.unconditional()
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
