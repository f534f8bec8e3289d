"""``attention`` against each of torch's backends and xformers.

    pytest bench/kernels/bench_attention.py [--benchmark-json FILE]

Device milliseconds, rates and shares of the device's ceilings are in each result's ``extra_info``.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Bench
from measure import COMMON, Calls, workload_id, workloads
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from catimage_accel.kernels.tuning.workload import Arguments, Workload

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One backend of torch's op, in the layout it takes: transposed views, no copy."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def baselines(arguments: Arguments) -> Calls:
    """Besides those of every op."""
    calls: Calls = {name: partial(with_backend, backend, **arguments) for name, backend in BACKENDS.items()}
    if find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        calls["xformers"] = partial(memory_efficient_attention, *(arguments[name] for name in ("q", "k", "v")))
    return calls


@pytest.mark.parametrize("implementation", [*COMMON, *BACKENDS, "xformers"])
@pytest.mark.parametrize("workload", workloads("attention"), ids=workload_id)
@torch.no_grad()
def test_attention(benchmark: Any, bench: Bench, workload: Workload, implementation: str) -> None:
    bench.run(benchmark, workload, implementation, baselines)
