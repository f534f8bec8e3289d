"""The memory layouts that ``group_norm``'s kernels read and write."""

from __future__ import annotations

import math

from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is dense in NC... or N...C order; what is not is copied into NC... order."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def tuned_shape(x: Tensor) -> dict[str, int]:
    """What launch configs and implementations go by: the memory format, then the pixels."""
    return {"channels_last": 1 if x.is_contiguous() else 2, "pixels": math.prod(x.shape[2:])}
