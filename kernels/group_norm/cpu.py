"""``group_norm`` by the C++ kernels of ``csrc/cpu/``, as ``torch.ops.catimage_accel_cpu.group_norm``, where built."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.group_norm.layout import is_dense


@torch.library.register_fake("catimage_accel_cpu::group_norm")
def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.preserve_format if is_dense(x) else torch.contiguous_format)


_op = torch.ops.catimage_accel_cpu.group_norm.default


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
    y: Tensor = _op(x, num_groups, weight, bias, float(eps), activation == "silu", shift)
    return y
