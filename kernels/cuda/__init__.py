"""The library of CUDA C++ kernels, where it was built: ``torch.ops.catimage_accel_cuda``."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

from catimage_accel.kernels.cuda.build import HOW_TO_BUILD, LIBRARY, is_stale

__all__ = ["BUILT", "HOW_TO_BUILD", "LIBRARY", "is_built", "load"]


def is_built(library: Path) -> bool:
    """Whether the library is there, and built from the sources that lie beside it; warns where from others."""
    if library.is_file() and is_stale(library):
        warnings.warn(
            f"{library} was built from other CUDA sources than there are now and is not used; rebuild: {HOW_TO_BUILD}",
            UserWarning,
            stacklevel=2,
        )
        return False
    return library.is_file()


# A constant, not a function: torch.compile cannot trace a look at the disk.
BUILT = is_built(LIBRARY)


@cache
def load() -> None:
    """Registers the ops. Works beside a PyTorch without CUDA too."""
    torch.ops.load_library(LIBRARY)
