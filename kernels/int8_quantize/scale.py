"""What INT8 numbers mean: a level ``q`` stands for ``q * scale``, symmetric about zero, with ``scale = amax / 127``.

Rounding is half to even and levels are clamped to [-128, 127] (the QuantizeLinear of ONNX with zero point 0). As in
``torch.fake_quantize_per_tensor_affine``, numbers are multiplied by the reciprocal of the scale, and NaN becomes -128:
an integer has no NaN to pass on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -128, 127


def to_levels(x: Tensor, scale: float) -> Tensor:
    """The levels of ``x`` as whole floating-point numbers in float32 (float64 of float64)."""
    x = x if x.dtype == torch.float64 else x.float()
    return (x * (1.0 / scale)).round().nan_to_num(nan=LOWEST).clamp(LOWEST, HIGHEST)


def check_scale(name: str, scale: float) -> None:
    """Raises ValueError unless float32 holds ``scale`` and its reciprocal as finite numbers above 0."""
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not (math.isfinite(scale) and tiny < scale < most and 1.0 / scale > tiny):
        raise ValueError(f"{name} is {scale}; accepted: a finite number above 0 (amax / 127)")
