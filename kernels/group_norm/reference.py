"""The definition of ``group_norm``, through torch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catimage_accel.kernels.int8_quantize.reference import int8_quantize


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str | None,
    shift: Tensor | None,
    output_scale: float | None,
) -> Tensor:
    """See :func:`catimage_accel.kernels.group_norm`."""
    if shift is not None:
        x = x + shift.reshape(*shift.shape, *(1,) * (x.ndim - 2))
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    y = F.silu(y) if activation == "silu" else y
    return y if output_scale is None else int8_quantize(y, output_scale)
