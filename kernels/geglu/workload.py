"""The feed-forward activations of SD1.5 and SDXL, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from catimage_accel.kernels.geglu import geglu
from catimage_accel.kernels.tuning.workload import STAGES, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of every transformer stage, four times as wide as its channels."""
    for stage in stages:
        if stage.heads:
            yield of_size(f"{stage.name}, batch {batch}", dtype, (batch, stage.side**2), 4 * stage.channels)


def of_size(name: str, dtype: torch.dtype, rows: tuple[int, int], width: int) -> Workload:
    """One call on a random tensor of these sizes."""
    numel = rows[0] * rows[1] * width
    return Workload(
        "geglu", name, rows[0], dtype, geglu, partial(_arguments, (*rows, 2 * width)), {"width": width},
        flops=10 * numel, bytes=3 * numel * dtype.itemsize,
    )  # fmt: skip


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.randn(shape, dtype=dtype, device=device)}


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape``."""
    for rows, columns, warps in product((1, 2, 4, 8, 16), (128, 256, 512, 1024), (4, 8)):
        if columns <= shape["width"] and 4 <= rows * columns // (32 * warps) <= 32:
            yield {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps}
