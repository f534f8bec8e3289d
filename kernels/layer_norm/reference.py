"""The definition of ``layer_norm``, through torch's own ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from catimage_accel.kernels.int8_quantize.reference import int8_quantize


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None
) -> Tensor:
    """See :func:`catimage_accel.kernels.layer_norm`."""
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return y if output_scale is None else int8_quantize(y, output_scale)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_scale: float | None
) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps, output_scale), total
