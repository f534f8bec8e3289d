"""Checks of arguments that several ops share."""

from __future__ import annotations

import math

from torch import Tensor


def check_same_kind(like: str, x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless all that is not ``None`` has the dtype and device of ``x``, the argument ``like``."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {like}'s, {x.dtype}")
        check_same_device(like, x, **{name: tensor})


def check_same_device(like: str, x: Tensor, **others: Tensor) -> None:
    """Raises ValueError unless all are on the device of ``x``, the argument ``like``."""
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; accepted: {like}'s device, {x.device}")


def check_eps(eps: float) -> None:
    """Raises ValueError unless ``eps`` may be added to a variance."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}; accepted: a finite number of 0 or more")
