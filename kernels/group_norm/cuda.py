"""``group_norm`` by the CUDA kernels of ``csrc/``, as ``torch.ops.catimage_accel_cuda.group_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.cuda import load
from catimage_accel.kernels.group_norm.layout import is_dense

load()


@torch.library.register_fake("catimage_accel_cuda::group_norm")
def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
) -> Tensor:
    # Without a copy of x: a PyTorch without CUDA cannot make one of a tensor that is said to be on a CUDA device.
    return torch.empty_like(x, memory_format=torch.preserve_format if is_dense(x) else torch.contiguous_format)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str | None,
    shift: Tensor | None = None,
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`; arguments are validated already."""
    op = torch.ops.catimage_accel_cuda.group_norm
    y: Tensor = op(x, num_groups, weight, bias, float(eps), activation == "silu", shift)
    return y
