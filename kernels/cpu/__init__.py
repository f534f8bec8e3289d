"""The library of C++ kernels for the CPU, where it was built: ``torch.ops.catimage_accel_cpu``."""

from __future__ import annotations

import warnings

import torch

from catimage_accel.kernels.build import CPU
from catimage_accel.kernels.built import is_built

__all__ = ["BUILT", "DTYPES"]

DTYPES = (torch.float32, torch.bfloat16)


def _loads() -> bool:
    """Registers the ops. A warning says where the library does not fit: ``accelerate`` takes it wherever it is."""
    try:
        torch.ops.load_library(CPU.path)
    except OSError as error:
        warnings.warn(f"{CPU.path} is not used: {error}; rebuild: {CPU.how_to_build}", UserWarning, stacklevel=2)
        return False
    return True


# A constant, not a function: torch.compile cannot trace a look at the disk.
BUILT = is_built(CPU) and _loads()
