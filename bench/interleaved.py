"""Times calls against each other: round by round, each once a round, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

WARMUP = 3
MOST_ROUNDS = 50
A_DAY = 86_400.0
ALARM_AGAIN = 2.0


@dataclass(frozen=True)
class Times:
    """One call's milliseconds in every round."""

    rounds: list[float]

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.rounds)

    def spread(self) -> tuple[float, float]:
        """What 20% and 80% of the rounds stay under."""
        ordered = sorted(self.rounds)
        return ordered[len(ordered) // 5], ordered[len(ordered) - 1 - len(ordered) // 5]

    def times_as_fast_as(self, other: Times) -> float:
        """Median of the ratios within each round."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.rounds, other.rounds, strict=True))

    def figures(self) -> dict[str, float | int]:
        """The median, the spread and the number of rounds, as result files have them."""
        low, high = self.spread()
        return {"ms": self.ms, "p20": low, "p80": high, "repeats": len(self.rounds)}


Calls = Mapping[str, Callable[[], Any]]


class OutOfTime(BaseException):
    """No Exception: torch's compiler would take it for a kernel that does not compile, and go on without the kernel."""


def warm_up(calls: Calls, *, until: float) -> tuple[Calls, dict[str, str]]:
    """Those that run (compiled ones get compiled), and why others do not.

    None is begun after ``until`` (monotonic), and one that is still being compiled then is given up.
    """
    run: dict[str, Callable[[], Any]] = {}
    not_run: dict[str, str] = {}
    for name, call in calls.items():
        left = until - time.monotonic()
        if left <= 0:
            not_run[name] = "time is out"
            continue
        try:
            with _at_most(left):
                for _ in range(WARMUP):
                    call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            run[name] = call
        except OutOfTime as late:
            not_run[name] = str(late)
        except Exception as error:  # one that does not run here must not keep the others from being measured
            not_run[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return run, not_run


def warm_up_in_portions(
    calls: Calls, compiled: Callable[[str], bool], *, until: float
) -> Iterator[tuple[Calls, dict[str, str]]]:
    """What :func:`warm_up` gives, of the calls that need no compiling, by name, and then of all.

    Compiling takes minutes, and a machine that is lent may be gone by then: the others are to be measured before.
    """
    slow = {name: call for name, call in calls.items() if compiled(name)}
    run, not_run = warm_up({name: call for name, call in calls.items() if name not in slow}, until=until)
    if run or not slow:
        yield run, not_run | dict.fromkeys(slow, "not compiled yet")
    if slow:
        more, failed = warm_up(slow, until=until)
        yield {**run, **more}, not_run | failed


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """OutOfTime, again and again, in what runs in the main thread after ``seconds``; at its end, if it was caught."""
    said = f"not ready in the {seconds:.0f} s that were left"
    rung = False

    def stop(*_: Any) -> None:
        nonlocal rung
        rung = True
        raise OutOfTime(said)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, A_DAY), ALARM_AGAIN)  # endless ones are refused
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if rung:  # and was caught: what was compiled lacks what the alarm cut off
        raise OutOfTime(said)


def interleave(
    calls: Calls,
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
    until: float = math.inf,
    wall: bool = False,
) -> dict[str, Times]:
    """Rounds for about ``seconds``, ``least`` at least. By CUDA events on a GPU; on a CPU in the process's CPU time.

    After ``until`` (monotonic) no round is begun but the first, however few there were.

    CPU time, as other programs take turns on a busy machine: with one thread it is the time of an idle one. ``wall``
    takes the time on the wall instead, for several threads, which count for more than they do while they wait.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    order = random.Random(0)
    for turn in range(MOST_ROUNDS):
        now = time.monotonic()
        if (turn >= least and now > end) or (turn and now > until):
            break
        # Caches hold what the call before left there, so nobody always comes after the same one.
        for name in order.sample(list(calls), len(calls)):
            found[name].append(_time(calls[name], device, time.perf_counter if wall else time.process_time))
    return {name: Times(rounds) for name, rounds in found.items()}


def _time(call: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        call()
        return 1000 * (clock() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
