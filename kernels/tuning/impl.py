"""Which implementation of an op was measured to be the fastest on a device."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import torch

from catimage_accel.kernels import tuning


def measured_impl(op: str, x: torch.Tensor) -> str | None:
    """The "impl" of the entry nearest to ``x`` in ``<op>.<device>.json``; ``None`` where nothing was measured.

    Args:
        op: Name of the op.
        x: (batch, channels, ...). Compared by memory format first, then by pixels.
    """
    pixels = math.prod(x.shape[2:])
    if pixels == 0:
        return None
    channels_last = 1 if x.is_contiguous() else 2
    nearest, least = None, math.inf
    for entry in measured(op, x.device):
        if entry["shape"]["channels_last"] == channels_last:
            distance = abs(math.log2(entry["shape"]["pixels"] / pixels))
            if distance < least:
                nearest, least = entry["impl"], distance
    return nearest


@torch.compiler.assume_constant_result
def measured(op: str, device: torch.device) -> list[dict[str, Any]]:
    """The entries of the device's file that name an implementation."""
    return _read(op, device)


@cache
def _read(op: str, device: torch.device) -> list[dict[str, Any]]:
    path = tuning.FOLDER / f"{op}.{tuning.device_slug(device)}.json"
    if not path.is_file():
        return []
    return [entry for entry in json.loads(path.read_text(encoding="utf-8")) if "impl" in entry]


def forget() -> None:
    """The files are read anew."""
    _read.cache_clear()
