"""The activations of SD1.5 and SDXL that nothing quantizes on the way, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from catimage_accel.kernels.int8_quantize import int8_quantize
from catimage_accel.kernels.tuning.workload import STAGES, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of every transformer stage: what attention hands to its last projection."""
    for stage in stages:
        if stage.heads:
            name = f"{stage.name}, batch {batch}"
            yield of_size(name, dtype, (batch, stage.side**2, stage.channels), False)


def of_size(name: str, dtype: torch.dtype, shape: tuple[int, ...], smooth: bool) -> Workload:
    """One call on a random tensor, with SmoothQuant's factors or without."""
    numel = torch.Size(shape).numel()
    return Workload(
        "int8_quantize", name, shape[0], dtype, int8_quantize, partial(_arguments, shape, smooth), {"numel": numel},
        flops=2 * numel, bytes=numel * (dtype.itemsize + 1),
    )  # fmt: skip


def _arguments(shape: tuple[int, ...], smooth: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    x = torch.randn(shape, dtype=dtype, device=device)
    channels = shape[1 if len(shape) == 4 else -1]
    return {"x": x, "scale": 0.025} | ({"input_scale": torch.rand(channels, device=device) + 0.5} if smooth else {})


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape``."""
    for block, warps in product((512, 1024, 2048, 4096, 8192), (2, 4, 8)):
        if 4 <= block // (32 * warps) <= 32:
            yield {"BLOCK": block, "num_warps": warps}
