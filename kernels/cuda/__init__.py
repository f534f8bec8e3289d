"""The library of CUDA C++ kernels, where it was built: ``torch.ops.catimage_accel_cuda``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("catimage_accel_cuda.so")
# A constant, not a function: torch.compile cannot trace a look at the disk.
BUILT = LIBRARY.is_file()
HOW_TO_BUILD = "python -m catimage_accel.kernels.cuda.build"


@cache
def load() -> None:
    """Registers the ops. Works beside a PyTorch without CUDA too."""
    torch.ops.load_library(LIBRARY)
