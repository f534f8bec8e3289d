"""What ``int8_linear``'s launch configs and implementations are chosen by."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16  # bytes that one instruction reads, where every row begins at a multiple of them


def tuned_shape(x: Tensor, weight: Tensor) -> dict[str, int]:
    """As ``launch_config`` takes it, the most decisive first."""
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    return {"aligned": aligned(in_features), "rows": rows, "out_features": out_features, "in_features": in_features}


def aligned(inner: int) -> int:
    """2 where rows of so many bytes are read 16 bytes at a time, 1 where byte by byte, for which small blocks do."""
    return 2 if inner % ALIGNMENT == 0 else 1
