"""Compiles CUDA kernels with ``cuda_emulator.h`` in CUDA's place, to run on the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from catimage_accel.kernels.build import CUDA

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-fno-strict-aliasing"]


def compile_emulation(name: str, folder: Path) -> ctypes.CDLL:
    """The library made of ``emulated_<name>.cpp``, written into ``folder``."""
    library = folder / f"{name}.so"
    assert CUDA.sources is not None
    command = [CUDA.find_compiler(), *FLAGS, f"-I{CUDA.sources}", HERE / f"emulated_{name}.cpp", "-o", library]
    compiled = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return ctypes.CDLL(str(library))
