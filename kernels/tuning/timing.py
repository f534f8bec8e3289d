"""Milliseconds of work on a CUDA device, without what the host adds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from catimage_accel.kernels.capture import capturing

WARMUP = 3


@dataclass(frozen=True)
class Timing:
    """The median of repeated runs, the times that 20% and 80% of them stay under, and how they were launched."""

    ms: float
    p20: float
    p80: float
    repeats: int
    graph: bool  # launched as a CUDA graph; False where the work cannot be captured and the host's gaps are in it


class DeviceTimer:
    """Times calls with CUDA events. The L2 cache is filled anew before each, and the call is captured in a CUDA graph.

    While the device fills the cache the host gets ahead, so that it is not waited for between the two events.
    """

    def __init__(self, device: torch.device, *, seconds: float = 0.05) -> None:
        """``seconds`` of device time are spent on a call, in 7 to 100 runs."""
        self.device = device
        self.seconds = seconds
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Four times as large, and only ever read: what is written would be written back while a call is timed.
        self._filling = torch.zeros(l2_bytes, dtype=torch.int32, device=device)
        self._largest = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def time(self, call: Callable[[], Any]) -> Timing:
        """Raises what ``call`` raises."""
        with torch.cuda.device(self.device):
            launch, graph = self._capture(call)
            first = self._run(launch)
            repeats = int(min(100, max(7, 1000 * self.seconds / max(first, 1e-3))))
            times = sorted(self._run_many(launch, repeats))
        low, high = times[repeats // 5], times[repeats - 1 - repeats // 5]
        return Timing(statistics.median(times), low, high, repeats, graph is not None)

    def _capture(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], torch.cuda.CUDAGraph | None]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, side):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return call, None
        return graph.replay, graph

    def _run(self, launch: Callable[[], Any]) -> float:
        return max(self._run_many(launch, 2))

    def _run_many(self, launch: Callable[[], Any], repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            torch.amax(self._filling, 0, out=self._largest)
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]
