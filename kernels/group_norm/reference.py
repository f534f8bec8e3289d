"""The definition of ``group_norm``, through torch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, activation: str | None
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`."""
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y
