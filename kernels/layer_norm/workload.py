"""The layer norms of SD1.5 and SDXL, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from catimage_accel.kernels.layer_norm import layer_norm
from catimage_accel.kernels.tuning.workload import STAGES, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of every transformer stage: a block's first norm, and those that follow a residual sum."""
    for stage in stages:
        if stage.heads:
            for residual in (False, True):
                name = f"{stage.name}{' after a sum' * residual}, batch {batch}"
                yield of_size(name, dtype, (batch, stage.side**2), stage.channels, residual)


def of_size(name: str, dtype: torch.dtype, rows: tuple[int, int], width: int, residual: bool) -> Workload:
    """One call on random tensors of these sizes."""
    numel = rows[0] * rows[1] * width
    return Workload(
        "layer_norm", name, rows[0], dtype, layer_norm, partial(_arguments, (*rows, width), residual),
        {"width": width}, flops=8 * numel, bytes=(4 if residual else 2) * numel * dtype.itemsize,
    )  # fmt: skip


def _arguments(shape: tuple[int, ...], residual: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    weight, bias = torch.randn(2, shape[-1], dtype=dtype, device=device)
    names = ("x", "residual") if residual else ("x",)
    tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name in names}
    return {**tensors, "weight": weight, "bias": bias}


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape``."""
    columns = 1 << (shape["width"] - 1).bit_length()
    for rows, warps in product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if 4 <= rows * columns // (32 * warps) <= 32:
            yield {"BLOCK_ROWS": rows, "num_warps": warps}
