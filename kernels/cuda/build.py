"""Compiles ``csrc/`` into the library of CUDA kernels: ``python -m catimage_accel.kernels.cuda``.

Takes nvcc and the headers of any PyTorch, also one without CUDA; no GPU. LibTorch's stable ABI is all that is used, so
the library outlives an update of PyTorch. Only the standard library is imported: ``setup.py`` runs this file too, where
neither this package nor PyTorch need be installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOW_TO_BUILD = "python -m catimage_accel.kernels.cuda"
LIBRARY = HERE / "catimage_accel_cuda.so"
SOURCES = next((folder for folder in (HERE.parent / "csrc", HERE.parent.parent / "csrc") if folder.is_dir()), None)
SUFFIXES = (".cu", ".cpp", ".cuh", ".h")
# Devices before sm_80 have no bfloat16; those after sm_90 compile the PTX when they first load it.
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
FLAGS = (
    "-std=c++20", "-O3", "-shared", "--threads=0", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    "-Xptxas", "-v", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def find_nvcc() -> Path | None:
    """CUDA's compiler: of CUDA_HOME, CUDA_PATH, the path, or where CUDA installs itself."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [*(home / "bin" / "nvcc" for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in found if path is not None and Path(path).is_file()), None)


def find_torch() -> Path | None:
    """The folder of an installed PyTorch, without importing it."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def why_not() -> str | None:
    """What is missing to build the library, if anything is."""
    if find_nvcc() is None:
        return "nvcc was not found"
    torch = find_torch()
    if torch is None:
        return f"PyTorch is not installed where this is built; once it is: {HOW_TO_BUILD}"
    if not (torch / "include/torch/csrc/stable/accelerator.h").is_file():
        return f"the PyTorch in {torch} has no headers of the stable ABI"
    if SOURCES is None:
        return "there is no csrc folder"
    return None


def digest(sources: Path) -> str:
    """Of the sources and how they are compiled, in hexadecimal: the library's build ID, which stripping leaves."""
    state = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(path for path in sources.iterdir() if path.suffix in SUFFIXES):
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)} ".encode() + content)
    return state.hexdigest()


def is_stale(library: Path) -> bool:
    """Whether the library was built from other sources than lie here; never so where none do."""
    return SOURCES is not None and bytes.fromhex(digest(SOURCES)) not in library.read_bytes()


def compile_library(target: Path, architectures: Sequence[str] = ARCHITECTURES) -> str:
    """Builds the library.

    Args:
        target: File to write.
        architectures: What nvcc's -gencode takes, each.

    Returns:
        What nvcc said, the registers and the spills of each kernel among it.

    Raises:
        RuntimeError: Something is missing, or a source does not compile.
    """
    reason = why_not()
    nvcc, torch = find_nvcc(), find_torch()
    if reason is not None or nvcc is None or torch is None or SOURCES is None:
        raise RuntimeError(f"the CUDA kernels cannot be built: {reason}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")  # what others have loaded is not written over
    command: list[str | Path] = [
        nvcc, *FLAGS, *(part for name in architectures for part in ("-gencode", name)), f"-I{torch / 'include'}",
        *sorted(SOURCES.glob("*.cu")), *sorted(SOURCES.glob("*.cpp")),
        "-Xlinker", f"--build-id=0x{digest(SOURCES)}",
        f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", unfinished,
    ]  # fmt: skip
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc failed:\n{run.stdout}")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return run.stdout


def main() -> None:
    """Builds the library in its place, or exits saying what is missing."""
    if (missing := why_not()) is not None:
        sys.exit(f"the CUDA kernels cannot be built: {missing}")
    compile_library(LIBRARY)
    print(f"built {LIBRARY}")


if __name__ == "__main__":
    main()
