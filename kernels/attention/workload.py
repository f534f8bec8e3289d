"""The attention of SD1.5 and SDXL, and the launch configs to try on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from catimage_accel.kernels.attention import attention
from catimage_accel.kernels.tuning.workload import STAGES, TEXT_TOKENS, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Self and cross attention of every transformer stage.

    The image decoders' one head of 512 columns is past what the kernel takes.
    """
    for stage in stages:
        if stage.heads:
            queries, head_dim = stage.side**2, stage.channels // stage.heads
            for kind, keys in (("self", queries), ("cross", TEXT_TOKENS)):
                name = f"{stage.name} {kind}, batch {batch}"
                yield of_size(name, dtype, batch, queries, keys, stage.heads, head_dim)


def of_size(
    name: str, dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, head_dim: int
) -> Workload:  # fmt: skip
    """One call on random tensors of these sizes."""
    return Workload(
        "attention", name, batch, dtype, attention, partial(_arguments, (batch, queries, keys, heads, head_dim)),
        {"itemsize": dtype.itemsize, "head_dim": head_dim, "keys": keys, "queries": queries},
        flops=4 * batch * heads * queries * keys * head_dim,
        bytes=2 * batch * heads * head_dim * (queries + keys) * dtype.itemsize,
    )  # fmt: skip


def _arguments(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, queries, keys, heads, head_dim = sizes
    lengths = {"q": queries, "k": keys, "v": keys}
    return {n: torch.randn(batch, length, heads, head_dim, dtype=dtype, device=device) for n, length in lengths.items()}


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape`` on a device whose blocks get ``shared_memory`` bytes."""
    # Padded to a power of 2, so that what fits here also fits the larger head_dims this one is the nearest to.
    columns = 1 << (shape["head_dim"] - 1).bit_length()
    itemsize = shape["itemsize"]
    for block_m, block_n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if (block_m + 2 * stages * block_n) * columns * itemsize > shared_memory:
            continue
        if block_n > 32 and block_n >= 2 * shape["keys"]:  # most of a block would be masked
            continue
        if stages > 2 and stages * block_n > 2 * shape["keys"]:  # the pipeline would never fill
            continue
        if block_m == 64 and warps == 8:  # a tensor core instruction takes 64 rows from 4 warps
            continue
        if block_m * (shape["head_dim"] + block_n) // (32 * warps) > 160:  # accumulators and scores would spill
            continue
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
