"""Limits on what takes long before it can be timed, and on the timing."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import interleaved
import pytest
import torch
from interleaved import interleave, warm_up

CPU = torch.device("cpu")


def waits_for_kernels() -> None:
    """As inductor waits for the kernels that it chooses from: a timeout costs them, and it goes on without."""
    with ThreadPoolExecutor(1) as pool:
        try:
            for future in as_completed([pool.submit(time.sleep, 0.4)], timeout=60):
                future.exception()
        except TimeoutError:
            pass


def hears_nothing() -> None:
    """Returns as if all were well."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        try:
            time.sleep(0.2)
        except BaseException:
            continue


def hears_once() -> None:
    """The alarm that it drops is not the last."""
    hears_nothing()
    time.sleep(30)


@pytest.mark.parametrize("call", [waits_for_kernels, hears_nothing, hears_once])
def test_what_is_not_ready_in_time_is_not_run(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "ALARM_AGAIN", 0.3)
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    run, not_run = warm_up({"slow": call}, until=start + 0.1)
    assert not run
    assert not_run == {"slow": "not ready in the 0 s that were left"}
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_one_that_fails_or_is_late_keeps_no_other_from_running() -> None:
    calls = {"late": waits_for_kernels, "wrong": lambda: 1 / 0, "right": lambda: None}
    run, not_run = warm_up(calls, until=time.monotonic() + 60)
    assert set(run) == {"late", "right"}
    assert not_run == {"wrong": "ZeroDivisionError: division by zero"}
    assert warm_up(calls, until=time.monotonic() - 1) == ({}, dict.fromkeys(calls, "time is out"))


@pytest.mark.parametrize(("seconds", "until", "rounds"), [(0.0, 60.0, 3), (60.0, -1.0, 1)])
def test_rounds_end_with_the_time_whatever_was_asked_for(seconds: float, until: float, rounds: int) -> None:
    found = interleave(
        {"a": lambda: None, "b": lambda: None}, CPU, seconds=seconds, least=3, until=time.monotonic() + until
    )
    assert [len(times.rounds) for times in found.values()] == [rounds, rounds]
