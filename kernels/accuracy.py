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
