"""How a call is timed, without a device: what is done before it, and what is left after it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import Streams, without_a_device
from torch.utils._python_dispatch import TorchDispatchMode

from catimage_accel.kernels.tuning.timing import DeviceTimer, Timing

CPU = torch.device("cpu")
L2_BYTES = 1000


class Event:
    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 10.0


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=L2_BYTES))
    return without_a_device(monkeypatch)


class Uses(TorchDispatchMode):
    """Whether each op on a tensor that is larger than the L2 cache writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for taken, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, torch.Tensor) and value.nbytes > L2_BYTES:
                self.writes.append(bool(taken.alias_info and taken.alias_info.is_write))
        return func(*args, **(kwargs or {}))


def test_the_cache_is_filled_by_reading(streams: Streams) -> None:
    """What is written would be written back while the call is timed."""
    timer = DeviceTimer(CPU)
    with Uses() as uses:
        timing = timer.time(lambda: None)
    assert timing == Timing(10.0, 10.0, 10.0, 7, True)
    assert uses.writes == [False] * (2 + timing.repeats)


def test_a_call_that_cannot_be_captured_is_timed_on_the_callers_stream(streams: Streams) -> None:
    caller, called_on = streams.current, []

    def call() -> None:
        called_on.append(streams.current)
        if len(called_on) == 4:  # after three to warm up
            raise RuntimeError("not to be captured")

    assert not DeviceTimer(CPU).time(call).graph
    assert streams.current is caller
    assert set(called_on[4:]) == {caller}
