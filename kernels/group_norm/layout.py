"""The memory layouts that ``group_norm``'s kernels read and write."""

from __future__ import annotations

from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is dense in NC... or N...C order; what is not is copied into NC... order."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()
