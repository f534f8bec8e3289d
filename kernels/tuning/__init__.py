"""Launch configs of the Triton kernels, read from JSON.

``<op>.<device>.json`` holds what was tuned on a device (its CUDA name in lower case, anything but letters and digits
turned into "-"); ``<op>.default.json`` holds conservative configs for every other. Each is a list of
``{"shape": {name: number}, "config": {name: number}}``; the entry whose shape is nearest in log2 is used.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


def launch_config(op: str, device: torch.device, **shape: int) -> dict[str, int]:
    """The config for ``shape`` (positive numbers, the same names as in the op's JSON), nearest match."""
    entries = _entries(op, _device_slug(device))
    return dict(min(entries, key=lambda entry: _distance(entry["shape"], shape))["config"])


def _distance(tuned: dict[str, int], shape: dict[str, int]) -> float:
    return sum(abs(math.log2(tuned[name] / size)) for name, size in shape.items())


def _device_slug(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@cache
def _entries(op: str, slug: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{op}.{slug}.json"
    if not path.is_file():
        path = FOLDER / f"{op}.default.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries
