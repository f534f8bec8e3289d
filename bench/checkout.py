"""Makes a plain checkout importable where only torch and triton are installed, and diffusers for all of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
BENCHMARKS = ROOT / "bench" / "kernels"


def map_package() -> None:
    """Puts this checkout first, and its ``kernels`` where an installation maps them."""
    sys.path[:0] = [str(ROOT), str(BENCHMARKS)]
    import catimage_accel

    found = importlib.util.find_spec("catimage_accel.kernels")
    # Another checkout may be installed.
    if found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(KERNELS):
        return
    _load_kernels(catimage_accel)


def map_kernels() -> None:
    """Puts this checkout's ``kernels`` where an installation maps them, and nothing else of the package."""
    package = ModuleType("catimage_accel")
    package.__path__ = []
    sys.modules["catimage_accel"] = package
    _load_kernels(package)
    sys.path.insert(0, str(BENCHMARKS))


def _load_kernels(package: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location(
        "catimage_accel.kernels", KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["catimage_accel.kernels"] = kernels
    package.kernels = kernels  # type: ignore[attr-defined]
    spec.loader.exec_module(kernels)
