"""Compiles ``csrc/`` into the libraries of kernels: ``python -m catimage_accel.kernels.cuda``, and ``cpu`` likewise.

They take nvcc, or a C++ compiler, and the headers of any PyTorch, also one without CUDA; no GPU. LibTorch's stable ABI
is all that is used, so the libraries outlive an update of PyTorch. Only the standard library is imported: ``setup.py``
runs this file too, where neither this package nor PyTorch need be installed. ``python build.py cuda`` builds by itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = next((folder for folder in (HERE / "csrc", HERE.parent / "csrc") if folder.is_dir()), None)
STABLE_ABI = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")
Command = list[str | Path]


def find_torch() -> Path | None:
    """The folder of an installed PyTorch, without importing it."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _first_file(paths: Sequence[str | Path | None]) -> Path | None:
    return next((Path(path) for path in paths if path is not None and Path(path).is_file()), None)


class Library:
    """The library of one kind of kernels."""

    kind = ""
    suffixes: tuple[str, ...] = ()  # of its sources
    flags: tuple[str, ...] = ()

    def __init__(self, path: Path, sources: Path | None) -> None:
        self.path, self.sources = path, sources

    @property
    def how_to_build(self) -> str:
        """The command."""
        return f"python -m catimage_accel.kernels.{self.kind.lower()}"

    def find_compiler(self) -> Path | None:
        """Where it is, if it is anywhere."""
        raise NotImplementedError

    def missing_compiler(self) -> str:
        """What to say where there is none."""
        raise NotImplementedError

    def commands(self, compiler: Path, torch: Path, sources: Path, target: Path, work: Path) -> Iterator[Command]:
        """What makes the library; ``work`` is an empty folder."""
        raise NotImplementedError

    def why_not(self) -> str | None:
        """What is missing to build the library, if anything is."""
        if self.find_compiler() is None:
            return self.missing_compiler()
        torch = find_torch()
        if torch is None:
            return f"PyTorch is not installed where this is built; once it is: {self.how_to_build}"
        if not (torch / "include/torch/csrc/stable/accelerator.h").is_file():
            return f"the PyTorch in {torch} has no headers of the stable ABI"
        if self.sources is None:
            return "there is no csrc folder"
        return None

    def digest(self, sources: Path) -> str:
        """Of the sources and how they are compiled, in hexadecimal: the library's build ID, which stripping leaves."""
        state = hashlib.sha256(repr(self.flags).encode())
        for path in sorted(path for path in sources.iterdir() if path.suffix in self.suffixes):
            content = path.read_bytes()
            state.update(f"{path.name} {len(content)} ".encode() + content)
        return state.hexdigest()

    def is_stale(self, library: Path) -> bool:
        """Whether the library was built from other sources than lie here; never so where none do."""
        return self.sources is not None and bytes.fromhex(self.digest(self.sources)) not in library.read_bytes()

    def compile(self, target: Path) -> str:
        """Builds the library as the file ``target``; returns what the compiler said.

        Raises:
            RuntimeError: Something is missing, or a source does not compile.
        """
        reason = self.why_not()
        compiler, torch = self.find_compiler(), find_torch()
        if reason is not None or compiler is None or torch is None or self.sources is None:
            raise RuntimeError(f"the {self.kind} kernels cannot be built: {reason}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")  # what others have loaded is not written over
        said = ""
        try:
            with tempfile.TemporaryDirectory() as work:
                for command in self.commands(compiler, torch, self.sources, unfinished, Path(work)):
                    run = subprocess.run(
                        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
                    )
                    if run.returncode != 0:
                        raise RuntimeError(f"{compiler.name} failed:\n{run.stdout}")
                    said += run.stdout
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
        return said

    def build(self) -> None:
        """Builds the library in its place, or exits saying what is missing."""
        if (missing := self.why_not()) is not None:
            sys.exit(f"the {self.kind} kernels cannot be built: {missing}")
        self.compile(self.path)
        print(f"built {self.path}")


class CudaLibrary(Library):
    """Every ``.cu`` and ``.cpp`` of ``csrc/``, by nvcc."""

    kind = "CUDA"
    suffixes = (".cu", ".cpp", ".cuh", ".h")
    flags = (
        "-std=c++20", "-O3", "-shared", "--threads=0", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        "-Xptxas", "-v", "-DUSE_CUDA", *STABLE_ABI,
    )  # fmt: skip
    # Devices before sm_80 have no bfloat16; those after sm_90 compile the PTX when they first load it.
    architectures: Sequence[str] = (
        "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90",
    )  # fmt: skip

    def find_compiler(self) -> Path | None:
        """nvcc: of CUDA_HOME, CUDA_PATH, the path, or where CUDA installs itself."""
        homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        return _first_file([*(home / "bin/nvcc" for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"])

    def missing_compiler(self) -> str:
        return "nvcc was not found"

    def commands(self, compiler: Path, torch: Path, sources: Path, target: Path, work: Path) -> Iterator[Command]:
        yield [
            compiler, *self.flags, *(part for name in self.architectures for part in ("-gencode", name)),
            f"-I{torch / 'include'}", *sorted(sources.glob("*.cu")), *sorted(sources.glob("*.cpp")),
            "-Xlinker", f"--build-id=0x{self.digest(sources)}",
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", target,
        ]  # fmt: skip


class CpuLibrary(Library):
    """Every ``.cpp`` of ``csrc/cpu/``; the loops, ``*_kernels.cpp``, once for each instruction set."""

    kind = "CPU"
    suffixes = (".cpp", ".h")
    flags = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast",
             "-fno-math-errno", "-fno-trapping-math", *STABLE_ABI)
    x86_64 = platform.machine().lower() in ("x86_64", "amd64")
    # Namespace of the compiled loops -> the instructions that they may use, beside those that every processor has.
    instruction_sets: Mapping[str, tuple[str, ...]] = {
        "baseline": (),
        **({
            "x86_64_v3": ("-march=x86-64-v3",),
            "x86_64_v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        } if x86_64 else {}),
    }  # fmt: skip

    def find_compiler(self) -> Path | None:
        """CXX, or what the path has."""
        names = (*((os.environ["CXX"],) if os.environ.get("CXX") else ()), "c++", "g++", "clang++")
        return _first_file([shutil.which(name) for name in names])

    def missing_compiler(self) -> str:
        return "no C++ compiler was found (c++, g++, clang++, or the one that CXX names)"

    def commands(self, compiler: Path, torch: Path, sources: Path, target: Path, work: Path) -> Iterator[Command]:
        defined = ("-DCATIMAGE_ACCEL_X86_64",) if self.x86_64 else ()
        objects = []
        for source in sorted(sources.glob("*.cpp")):
            loops = source.stem.endswith("_kernels")
            for name, allowed in self.instruction_sets.items() if loops else (("", ()),):
                objects.append(work / f"{source.stem}.{name}.o")
                chosen = (*allowed, f"-DINSTRUCTION_SET={name}") if loops else defined
                yield [
                    compiler, *self.flags, *chosen, "-isystem", torch / "include", "-c", source, "-o", objects[-1]
                ]  # fmt: skip
        yield [
            compiler, "-shared", *objects, f"-Wl,--build-id=0x{self.digest(sources)}",
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", target,
        ]  # fmt: skip


CUDA = CudaLibrary(HERE / "cuda" / "catimage_accel_cuda.so", CSRC)
CPU = CpuLibrary(HERE / "cpu" / "catimage_accel_cpu.so", None if CSRC is None else CSRC / "cpu")
LIBRARIES = {"cuda": CUDA, "cpu": CPU}


if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in LIBRARIES):
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(LIBRARIES)}")
    LIBRARIES[sys.argv[1]].build()
