"""The group norms of SD1.5 and SDXL, UNet and image decoder, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from catimage_accel.kernels.group_norm import group_norm
from catimage_accel.kernels.tuning.workload import STAGES, Stage, Workload

GROUPS = 32
DECODER = (("SD1.5 decoder 64x64", 512, 64), ("SD1.5 decoder 256x256", 512, 256), ("SD1.5 decoder 512x512", 128, 512),
           ("SDXL decoder 1024x1024", 128, 1024))  # fmt: skip


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """GroupNorm and SiLU in both layouts: of the UNet's blocks, after the time embedding, and of the decoder's."""
    unet = [(stage.name, stage.channels, stage.side, True) for stage in stages]
    decoder = [(*sizes, False) for sizes in DECODER] if stages is STAGES else []
    for name, channels, side, shifted in (*unet, *decoder):
        for last in (False, True):
            layout = "channels_last" if last else "NCHW"
            yield of_size(
                f"{name} {layout}, batch {batch}", dtype, (batch, channels, side, side), GROUPS, last, shifted
            )


def of_size(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int, int], groups: int, last: bool, shifted: bool
) -> Workload:
    """One call on random tensors of this shape, with SiLU."""
    batch, channels, height, width = shape
    return Workload(
        "group_norm", name, batch, dtype, group_norm, partial(_arguments, shape, groups, last, shifted),
        {"channels_last": 1 + last, "pixels": height * width},
        flops=10 * batch * channels * height * width,
        bytes=2 * batch * channels * height * width * dtype.itemsize,
    )  # fmt: skip


def _arguments(
    shape: tuple[int, int, int, int], groups: int, last: bool, shifted: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    x = torch.randn(shape, dtype=dtype, device=device)
    weight, bias = torch.randn(2, shape[1], dtype=dtype, device=device)
    shift = {"shift": torch.randn(shape[:2], dtype=dtype, device=device)} if shifted else {}
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return {"x": x, "num_groups": groups, "weight": weight, "bias": bias, "activation": "silu", **shift}


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape``."""
    if shape["channels_last"] == 2:
        for chunk, pixels, channels, warps in product((16, 64, 256, 1024), (8, 16, 32), (64, 128), (4, 8)):
            in_thread = pixels * channels // (32 * warps)
            if shape["pixels"] > 4096 * chunk:  # merging the chunks would cost more than reading them
                continue
            if pixels <= chunk <= max(16, shape["pixels"]) and 4 <= in_thread <= 16:
                yield {
                    "CHUNK": chunk, "BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels, "COMBINE": 256,
                    "num_warps": warps,
                }  # fmt: skip
        return
    for chunk, block, warps in product((2048, 4096, 8192, 16384, 65536), (512, 1024, 2048, 4096), (4, 8)):
        if block <= chunk <= 40 * max(64, shape["pixels"]) and 4 <= block // (32 * warps) <= 16:
            yield {"CHUNK": chunk, "BLOCK": block, "COMBINE": 256, "num_warps": warps}
