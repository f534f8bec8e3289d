"""Which implementation of an op was measured to be the fastest on a device."""

from __future__ import annotations

import math
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
    entries = tuning.read_entries(op, tuning.device_slug(device)) or []
    return [entry for entry in entries if "impl" in entry]
