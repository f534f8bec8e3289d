"""``attention`` against each of torch's backends and xformers.

    pytest bench/kernels/bench_attention.py [--benchmark-json FILE]

Device milliseconds, rates and shares of the device's ceilings are in each result's ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_baselines import BACKENDS, attention_baselines
from harness import Bench
from measure import UNCOMPILED, workload_id, workloads

from catimage_accel.kernels.tuning.workload import Workload


@pytest.mark.parametrize("implementation", [*UNCOMPILED, *BACKENDS, "xformers"])
@pytest.mark.parametrize("workload", workloads("attention"), ids=workload_id)
@torch.no_grad()
def test_attention(benchmark: Any, bench: Bench, workload: Workload, implementation: str) -> None:
    bench.run(benchmark, workload, implementation, attention_baselines)
