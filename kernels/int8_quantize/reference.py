"""The definition of ``int8_quantize``, through torch's own ops."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import to_levels


def int8_quantize(x: Tensor, scale: float, input_scale: Tensor | None = None) -> Tensor:
    """See :func:`catimage_accel.kernels.int8_quantize`."""
    if input_scale is not None:
        x = x * (input_scale if x.ndim != 4 else input_scale[:, None, None])  # float32 times any other is float32
    return to_levels(x, scale).to(torch.int8)
