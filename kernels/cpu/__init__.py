"""The library of C++ kernels for the CPU, where it was built: ``torch.ops.catimage_accel_cpu``."""

from __future__ import annotations

from functools import cache

import torch

from catimage_accel.kernels.build import CPU
from catimage_accel.kernels.built import is_built

__all__ = ["BUILT", "DTYPES", "load"]

DTYPES = (torch.float32, torch.bfloat16)
# A constant, not a function: torch.compile cannot trace a look at the disk.
BUILT = is_built(CPU)


@cache
def load() -> None:
    """Registers the ops."""
    torch.ops.load_library(CPU.path)
