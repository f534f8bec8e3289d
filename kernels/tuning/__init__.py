"""Launch configs of the Triton kernels, read from JSON.

``<op>.<device>.json`` holds what ``catimage bench tune`` measured on a device (its CUDA name in lower case, anything
but letters and digits turned into "-"); ``<op>.default.json`` holds conservative configs for every other device and for
shapes that the device's file says nothing of. Each is a list of
``{"shape": {name: number}, "config": {name: number}}``; the entry whose shape is nearest is used.
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
# A size that torch.compile leaves open is taken as the next of these: it is guarded by a range, not by its value.
SIZES = sorted({round(2 ** (i / 4)) for i in range(129)})

_forced: ContextVar[tuple[str, dict[str, int]] | None] = ContextVar("_forced", default=None)


def launch_config(op: str, device: torch.device, **shape: int) -> dict[str, int]:
    """The config of the entry nearest to ``shape``.

    Args:
        op: Name of the op.
        device: Where it will run; warns once where no config was tuned there.
        shape: Positive numbers, the most decisive first: entries are compared by the distance in log2 of the first,
            then of the second, and so on. A name that an entry lacks is no distance.
    """
    forced = _forced.get()
    if forced is not None and forced[0] == op:
        return dict(forced[1])
    return dict(nearest(_entries(op, device_slug(device)), shape)["config"])


def nearest(entries: list[dict[str, Any]], shape: dict[str, int]) -> dict[str, Any]:
    """The entry whose shape is nearest, as ``launch_config`` compares."""
    sizes = {name: size if type(size) is int else SIZES[bisect_left(SIZES, size)] for name, size in shape.items()}
    found, least = entries[0], _distance(entries[0]["shape"], sizes)
    for entry in entries[1:]:  # torch.compile does not trace min with a key
        distance = _distance(entry["shape"], sizes)
        if distance < least:
            found, least = entry, distance
    return found


@contextmanager
def use_config(op: str, config: dict[str, int]) -> Iterator[None]:
    """``launch_config`` of ``op`` is ``config``, in this thread, while the context lasts."""
    token = _forced.set((op, config))
    try:
        yield
    finally:
        _forced.reset(token)


def device_slug(device: torch.device) -> str:
    """What a device is called in file names; "default" for one that is no CUDA device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def forget() -> None:
    """The files are read anew."""
    read_entries.cache_clear()
    _entries.cache_clear()


def _distance(tuned: dict[str, int], shape: dict[str, int]) -> list[float]:
    """The factors between sizes, which order as their logarithms do: torch.compile traces no logarithm of a size."""
    distance = []
    for name, size in shape.items():
        own = tuned.get(name, size)
        distance.append(own / size if own > size else size / own)
    return distance


@cache
def _entries(op: str, slug: str) -> list[dict[str, Any]]:
    defaults = read_entries(op, "default") or []
    if slug == "default":
        return defaults
    tuned = read_entries(op, slug)
    if tuned is None:
        warnings.warn(
            f"no launch configs of {op} were tuned on {slug}: using those that fit any device; "
            "`catimage bench tune` measures better ones",
            UserWarning,
            stacklevel=3,
        )
        return defaults
    return tuned + [entry for entry in defaults if not any(_covers(other["shape"], entry["shape"]) for other in tuned)]


def _covers(tuned: dict[str, int], default: dict[str, int]) -> bool:
    return all(tuned.get(name) == size for name, size in default.items())


def with_entry(entries: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of an op's file and a new one, in the place of an older one of its shape."""
    return [entry for entry in entries if entry["shape"] != new["shape"]] + [new]


@cache
def read_entries(op: str, slug: str) -> list[dict[str, Any]] | None:
    """What the op's file of a device holds; ``None`` where there is no such file."""
    path = FOLDER / f"{op}.{slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
