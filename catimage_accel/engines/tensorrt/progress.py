"""How far a build is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "progress_monitor"]


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """Nested phases as one growing share of the whole, told to ``advance`` with the name of the phase.

    A phase's share of its parent is one step, so the share is a guess that never goes back. The library may call from
    several threads.
    """

    def __init__(self, advance: Callable[[str, float], None]) -> None:
        self.interrupted = False
        self._advance = advance
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0
        self._lock = threading.RLock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))
            self._tell(name)

    def step(self, name: str, step: int) -> bool:
        """False if the build is to stop, because the user interrupted it."""
        try:
            with self._lock:
                if name in self._phases:
                    self._phases[name].done = min(step + 1, self._phases[name].steps)
                    self._tell(name)
        except KeyboardInterrupt:
            # An exception can't travel through the library; the builder raises it again.
            self.interrupted = True
        return not self.interrupted

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None and not self._phases:
                self._advance(name, 1.0)

    def _tell(self, name: str) -> None:
        phase: _Phase | None = self._phases[name]
        share, seen = 0.0, set()
        while phase is not None and id(phase) not in seen:
            seen.add(id(phase))
            share = min(1.0, (phase.done + share) / phase.steps)
            phase = self._phases.get(phase.parent) if phase.parent else None
        self._share = max(self._share, share)
        self._advance(name, self._share)


def progress_monitor(trt: Any, progress: Progress) -> Any:
    """An ``IProgressMonitor`` of the library ``trt`` over ``progress``. Keep it until the build is over."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
