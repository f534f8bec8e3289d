"""Makes a plain checkout importable, where nothing is installed but torch, triton and diffusers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def map_package() -> None:
    """Puts this checkout first, and its ``kernels`` where an installation maps them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "kernels")]
    import catimage_accel

    folder = ROOT / "kernels"
    found = importlib.util.find_spec("catimage_accel.kernels")
    # Another checkout may be installed.
    if found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(folder):
        return
    spec = importlib.util.spec_from_file_location(
        "catimage_accel.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["catimage_accel.kernels"] = kernels
    catimage_accel.kernels = kernels  # type: ignore[attr-defined]
    spec.loader.exec_module(kernels)
