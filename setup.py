"""Maps ``kernels`` and ``csrc`` into the package, and builds the C++ kernels whose compiler and PyTorch are found.

Inside pip's build isolation there is no PyTorch, so a plain install skips them, with a line each that says how to build
them later. ``pip install --no-build-isolation .`` builds them at once; ``CATIMAGE_ACCEL_CUDA=0`` and
``CATIMAGE_ACCEL_CPU=0`` keep it from that.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

LIBRARIES = runpy.run_path(str(Path(__file__).parent / "kernels" / "build.py"))["LIBRARIES"]
OFF = {name: f"CATIMAGE_ACCEL_{name.upper()}" for name in LIBRARIES}
SKIPPED = {
    name: f"{OFF[name]} is 0" if os.environ.get(OFF[name]) == "0" else library.why_not()
    for name, library in LIBRARIES.items()
}


class BuildPython(build_py):
    """Says which kernels are skipped."""

    def run(self) -> None:
        for name, reason in SKIPPED.items():
            if reason is not None:
                print(f"catimage_accel: {LIBRARIES[name].kind} kernels skipped: {reason}", flush=True)
        super().run()


class BuildKernels(build_ext):
    """Compiles the extensions, plain libraries that Python does not import."""

    def build_extension(self, ext: Extension) -> None:
        LIBRARIES[ext.name.split(".")[-2]].compile(Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class Wheel(bdist_wheel):
    """With a library a wheel fits one platform, and still any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def extension(name: str) -> Extension:
    """``catimage_accel.kernels.cuda.catimage_accel_cuda`` and its like."""
    here, library = Path(__file__).parent.resolve(), LIBRARIES[name]
    sources = [path.relative_to(here) for path in sorted(library.sources.iterdir()) if path.suffix in (".cu", ".cpp")]
    return Extension(f"catimage_accel.kernels.{name}.{library.path.stem}", [str(path) for path in sources])


kernel_packages = ["catimage_accel.kernels", *(f"catimage_accel.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[
        *find_packages(include=["catimage_accel", "catimage_accel.*"]), *kernel_packages, "catimage_accel.kernels.csrc",
    ],
    package_dir={"catimage_accel.kernels": "kernels", "catimage_accel.kernels.csrc": "csrc"},
    ext_modules=[extension(name) for name, reason in SKIPPED.items() if reason is None],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)  # fmt: skip
