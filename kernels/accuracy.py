"""The accuracy rule that every op and implementation is held to: at most twice the error of torch's own op."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Against the float64 result; NaN where either has one."""
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def allowed_error(torchs: Tensor, exact: Tensor) -> float:
    """Twice the error of torch's own op in the same dtype, plus a hair.

    The hair is half a unit in the last place of the largest value: what rounding the exact result costs.
    """
    if exact.numel() == 0:
        return 0.0
    return 2 * largest_error(torchs, exact) + torch.finfo(torchs.dtype).eps / 2 * exact.abs().max().item()


def excess_error(levels: Tensor, exact: Tensor, scale: float) -> float:
    """How far INT8 levels are from the real values they stand for, beyond the half level that rounding costs.

    In real values, so that ``allowed_error`` of the values before they are rounded is what it may be: a result differs
    from the rounded exact one only where that is as close to a tie. NaN counts as what it becomes, the lowest level.
    """
    if exact.numel() == 0:
        return 0.0
    wanted = (exact / scale).nan_to_num(nan=-128.0).clamp(-128, 127)
    return max(0.0, (levels.double() - wanted).abs().max().item() - 0.5) * scale
