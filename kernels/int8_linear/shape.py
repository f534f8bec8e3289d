"""What ``int8_linear``'s launch configs and implementations are chosen by."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16  # numbers: what one instruction reads of INT8, where every row begins at a multiple


def tuned_shape(x: Tensor, weight: Tensor) -> dict[str, int]:
    """As ``launch_config`` takes it, the most decisive first."""
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    return {
        "aligned": aligned(in_features, out_features), "rows": rows, "out_features": out_features,
        "in_features": in_features,
    }  # fmt: skip


def aligned(inner: int, outer: int) -> int:
    """2 where rows are read and written 16 numbers at a time, 1 where one by one, for which small blocks do."""
    return 2 if inner % ALIGNMENT == outer % ALIGNMENT == 0 else 1
