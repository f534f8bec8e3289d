"""Which implementation of an op was measured to be the fastest on a device."""

from __future__ import annotations

from typing import Any

import torch

from catimage_accel.kernels import tuning


def measured_impl(op: str, device: torch.device, **shape: int) -> str | None:
    """The "impl" of the entry nearest to ``shape`` in ``<op>.<device>.json``; ``None`` where none was measured.

    Args:
        op: Name of the op.
        device: Where it will run.
        shape: As of ``launch_config``.
    """
    entries = measured(op, device)
    if not entries or 0 in shape.values():
        return None
    impl: str | None = tuning.nearest(entries, shape).get("impl")
    return impl


def measured_speedup(op: str, device: torch.device, **shape: int) -> float | None:
    """How many times as fast a quantized layer was measured to be as the same one in half precision.

    Of the entry nearest to ``shape``, as ``measured_impl``; ``None`` where nothing was measured.
    """
    entries = [entry for entry in measured(op, device) if "speedup" in entry]
    if not entries or 0 in shape.values():
        return None
    speedup: float = tuning.nearest(entries, shape)["speedup"]
    return speedup


@torch.compiler.assume_constant_result
def measured(op: str, device: torch.device) -> list[dict[str, Any]]:
    """The entries of the device's file."""
    return tuning.read_entries(op, tuning.device_slug(device)) or []
