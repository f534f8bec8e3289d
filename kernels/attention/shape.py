"""What ``attention``'s launch configs and implementations are chosen by."""

from __future__ import annotations

from torch import Tensor


def tuned_shape(q: Tensor, k: Tensor) -> dict[str, int]:
    """As ``launch_config`` takes it, the most decisive first."""
    return {"itemsize": q.dtype.itemsize, "head_dim": q.shape[3], "keys": k.shape[1], "queries": q.shape[1]}
