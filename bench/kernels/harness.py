"""Runs one implementation of one workload under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Baselines, calls, meaning, measure_ceilings, the_device, workload_id

from catimage_accel.kernels.device import device_name
from catimage_accel.kernels.tuning.timing import DeviceTimer
from catimage_accel.kernels.tuning.workload import Workload


class Bench:
    """One device and its ceilings, for a whole run of pytest."""

    def __init__(self) -> None:
        self.device = the_device()
        self.cuda = self.device.type == "cuda"
        self.timer = DeviceTimer(self.device) if self.cuda else None
        self.ceilings = measure_ceilings(self.device, self.timer) if self.timer else None

    def run(self, benchmark: Any, workload: Workload, name: str, baselines: Baselines | None = None) -> None:
        """The host's time goes where pytest-benchmark has it, the device's into ``extra_info``."""
        arguments = workload.arguments(self.device)
        call = calls(workload, arguments, baselines).get(name)
        if call is None:
            pytest.skip(f"{name} is not installed")
        try:
            call()
        except (ValueError, RuntimeError) as error:
            pytest.skip(f"{name} does not run here: {str(error).splitlines()[0]}")
        benchmark.group = f"{workload.op}: {workload_id(workload)}"
        benchmark.extra_info |= {
            "op": workload.op, "workload": workload.name, "batch": workload.batch, "dtype": str(workload.dtype),
            "implementation": name, "device": device_name(self.device), "small_cpu_run": not self.cuda,
        }  # fmt: skip
        if self.timer and self.ceilings:
            benchmark.extra_info |= meaning(workload, self.timer.time(call), self.ceilings)

        def and_wait() -> None:
            call()
            if self.cuda:
                torch.cuda.synchronize(self.device)

        benchmark.pedantic(and_wait, rounds=20, warmup_rounds=3)
