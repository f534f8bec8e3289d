"""What ``attention`` is held against besides what every op is: torch's backends, one by one, and xformers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch.nn.functional as F
from measure import Calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from catimage_accel.kernels.tuning.workload import Arguments

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One backend of torch's op, in the layout it takes: transposed views, no copy."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def attention_baselines(arguments: Arguments) -> Calls:
    """By name, ready to be called."""
    calls: Calls = {name: partial(with_backend, backend, **arguments) for name, backend in BACKENDS.items()}
    if find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        calls["xformers"] = partial(memory_efficient_attention, *(arguments[name] for name in ("q", "k", "v")))
    return calls
