"""What an engine raises when it can't run here."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

__all__ = ["EngineUnavailable", "tell_once", "why_missing"]

_told: set[str] = set()


class EngineUnavailable(RuntimeError):
    """An engine that can't be built or run on this machine; one line that says why and what to do about it.

    Whoever asked goes on with the next engine.
    """


def why_missing(packages: tuple[str, ...], extra: str) -> str | None:
    """Which of the packages that ``extra`` brings is not installed, and how to have it; None if all are. Cheap."""
    missing = [package for package in packages if find_spec(package) is None]
    return f"{' and '.join(missing)} not installed: pip install 'catimage-accel[{extra}]'" if missing else None


def tell_once(text: str) -> None:
    """A UserWarning with ``text``, unless this process has had it."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, UserWarning, stacklevel=3)
