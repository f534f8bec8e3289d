"""Whether a library of kernels can be used."""

from __future__ import annotations

import warnings

from catimage_accel.kernels.build import Library


def is_built(library: Library) -> bool:
    """Whether the library is there, and built from the sources that lie beside it; warns where from others."""
    if library.path.is_file() and library.is_stale(library.path):
        warnings.warn(
            f"{library.path} was built from other {library.kind} sources than there are now and is not used; rebuild: "
            f"{library.how_to_build}",
            UserWarning,
            stacklevel=3,
        )
        return False
    return library.path.is_file()
