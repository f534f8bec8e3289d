"""``int8_linear`` against the same layer in float16 and torch._int_mm.

    pytest bench/kernels/bench_int8_linear.py [--benchmark-json FILE]

Device milliseconds, rates and shares of the device's ceilings are in each result's ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Bench
from measure import UNCOMPILED, workload_id, workloads

from catimage_accel.kernels.tuning.workload import Workload


@pytest.mark.parametrize("implementation", [*UNCOMPILED, "int_mm"])
@pytest.mark.parametrize("workload", workloads("int8_linear"), ids=workload_id)
@torch.no_grad()
def test_int8_linear(benchmark: Any, bench: Bench, workload: Workload, implementation: str) -> None:
    bench.run(benchmark, workload, implementation)
