"""What ``attention`` accepts."""

from __future__ import annotations

import math

from torch import Tensor

from catimage_accel.kernels.validation import check_same_kind


def validate(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if q.ndim != 4 or q.shape[3] == 0 or not q.is_floating_point():
        raise ValueError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; "
            "accepted: a floating-point (batch, sequence, heads, head_dim) tensor with head_dim of at least 1"
        )
    batch, _, heads, head_dim = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"k has shape {tuple(k.shape)}; accepted: ({batch}, any length, {heads}, {head_dim}) for q of shape "
            f"{tuple(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; accepted: k's, {tuple(k.shape)}")
    check_same_kind("q", q, k=k, v=v)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; accepted: a finite number or None (1 / sqrt(head_dim))")
