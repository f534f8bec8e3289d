"""Maps ``kernels`` and ``csrc`` into the package, and builds the CUDA kernels where nvcc and PyTorch are found.

Inside pip's build isolation there is no PyTorch, so a plain install skips them, with one line that says how to build
them later. ``pip install --no-build-isolation .`` builds them at once; ``CATIMAGE_ACCEL_CUDA=0`` keeps it from that.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

cuda = runpy.run_path(str(Path(__file__).parent / "kernels" / "cuda" / "build.py"))
skipped = "CATIMAGE_ACCEL_CUDA is 0" if os.environ.get("CATIMAGE_ACCEL_CUDA") == "0" else cuda["why_not"]()


class BuildPython(build_py):
    """Says that the CUDA kernels are skipped."""

    def run(self) -> None:
        if skipped is not None:
            print(f"catimage_accel: CUDA kernels skipped: {skipped}", flush=True)
        super().run()


class BuildCuda(build_ext):
    """Compiles the one extension, a plain library that Python does not import."""

    def build_extension(self, ext: Extension) -> None:
        cuda["compile_library"](Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class Wheel(bdist_wheel):
    """With the library a wheel fits one platform, and still any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


kernel_packages = ["catimage_accel.kernels", *(f"catimage_accel.kernels.{name}" for name in find_packages("kernels"))]
sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern))

setup(
    packages=[
        *find_packages(include=["catimage_accel", "catimage_accel.*"]), *kernel_packages, "catimage_accel.kernels.csrc",
    ],
    package_dir={"catimage_accel.kernels": "kernels", "catimage_accel.kernels.csrc": "csrc"},
    ext_modules=[] if skipped else [Extension("catimage_accel.kernels.cuda.catimage_accel_cuda", sources)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildCuda, "bdist_wheel": Wheel},
)  # fmt: skip
