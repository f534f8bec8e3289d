"""The library of CUDA C++ kernels, where it was built: ``torch.ops.catimage_accel_cuda``."""

from __future__ import annotations

from functools import cache

import torch

from catimage_accel.kernels.build import CUDA
from catimage_accel.kernels.built import is_built

__all__ = ["BUILT", "load"]

# A constant, not a function: torch.compile cannot trace a look at the disk.
BUILT = is_built(CUDA)


@cache
def load() -> None:
    """Registers the ops. Works beside a PyTorch without CUDA too."""
    torch.ops.load_library(CUDA.path)
