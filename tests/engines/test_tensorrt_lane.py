"""A lane's captures, without a device."""

from __future__ import annotations

import pytest
import torch
from streams import without_a_device

from catimage_accel.engines.tensorrt.cuda import Lane


def test_a_capture_that_fails_leaves_the_caller_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = without_a_device(monkeypatch)
    caller, lane = streams.current, Lane(torch.device("cuda"))
    handles: list[int] = []

    def fails(handle: int) -> None:
        raise RuntimeError("not to be captured")

    assert lane.capture(fails) is None
    assert streams.current is caller
    assert lane.capture(handles.append) is not None
    assert streams.current is caller
    assert handles == [streams.captures[0][0].cuda_stream]
