"""The memory layouts that ``group_norm``'s kernels read and write."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is dense in NC... or N...C order; what is not is copied into NC... order."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def tuned_shape(x: Tensor) -> dict[str, int]:
    """What launch configs and implementations go by: the memory format, then the pixels."""
    return {"channels_last": 1 if x.is_contiguous() else 2, "pixels": math.prod(x.shape[2:])}


LEAST_CPU_PIXELS, LEAST_CPU_VALUES = 256, 2**18


def suits_cpu_kernel(x: Tensor) -> bool:
    """Whether the C++ kernel was measured to be faster than torch's, by what one image has: so that the batch does not
    change how an image is rounded.

    In NC... order torch's is as fast in float32, but for the passes over memory that large images take.
    """
    if not x.is_contiguous():
        return True
    values = x.stride(0)  # of an image: a cheap question, for it is asked before every small norm
    return values >= (LEAST_CPU_VALUES if x.dtype == torch.float32 else LEAST_CPU_PIXELS * x.shape[1])
