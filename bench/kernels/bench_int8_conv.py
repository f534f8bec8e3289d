"""``int8_conv`` against cuDNN's convolution in float16, both in channels-last memory.

    pytest bench/kernels/bench_int8_conv.py [--benchmark-json FILE]

Device milliseconds, rates and shares of the device's ceilings are in each result's ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Bench
from measure import UNCOMPILED, workload_id, workloads

from catimage_accel.kernels.tuning.workload import Workload


@pytest.mark.parametrize("implementation", UNCOMPILED)
@pytest.mark.parametrize("workload", workloads("int8_conv"), ids=workload_id)
@torch.no_grad()
def test_int8_conv(benchmark: Any, bench: Bench, workload: Workload, implementation: str) -> None:
    bench.run(benchmark, workload, implementation)
