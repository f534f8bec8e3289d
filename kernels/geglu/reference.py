"""The definition of ``geglu``, through torch's own ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from catimage_accel.kernels.int8_quantize.reference import int8_quantize


def geglu(x: Tensor, output_scale: float | None) -> Tensor:
    """See :func:`catimage_accel.kernels.geglu`."""
    value, gate = x.chunk(2, dim=-1)
    y = value * F.gelu(gate)
    return y if output_scale is None else int8_quantize(y, output_scale)
