"""The linear layers of SD1.5's and SDXL's transformers, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from catimage_accel.kernels.int8_linear import int8_linear
from catimage_accel.kernels.int8_linear.shape import aligned
from catimage_accel.kernels.tuning.workload import STAGES, Arguments, Stage, Workload

X_SCALE = 0.03
OUTPUT_SCALE = 0.05
LEAST_ROWS = 64  # of a block that a Hopper matrix instruction takes


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of every transformer stage: the projections of attention, and both layers of the feed-forward network."""
    for stage in stages:
        if stage.heads:
            channels, rows = stage.channels, (batch, stage.side**2)
            for kind, out_features, in_features, residual in (
                ("projection", channels, channels, False),
                ("feed-forward in", 8 * channels, channels, False),
                ("feed-forward out", channels, 4 * channels, True),
            ):
                name = f"{stage.name} {kind}, batch {batch}"
                yield of_size(name, dtype, rows, out_features, in_features, residual)


def of_size(
    name: str,
    dtype: torch.dtype,
    rows: tuple[int, int],
    out_features: int,
    in_features: int,
    residual: bool,
    quantized: bool = False,
) -> Workload:
    """One call on random integers, into ``dtype``, or ``quantized`` again into int8."""
    many = rows[0] * rows[1]
    unquantized = {"output_scale": None, "out_dtype": torch.float32} if quantized else {}
    takes_int_mm = many > 16 and out_features % 8 == in_features % 8 == 0
    return Workload(
        "int8_linear", name, rows[0], dtype, int8_linear,
        partial(_arguments, (*rows, in_features), out_features, residual, quantized),
        {
            "aligned": aligned(in_features, out_features), "rows": many, "out_features": out_features,
            "in_features": in_features,
        },
        flops=2 * many * out_features * in_features,
        bytes=(many + out_features) * in_features + (1 + residual) * many * out_features * dtype.itemsize,
        exact_as_is=("x", "weight", "weight_scale"), unquantized=unquantized,
        libraries=("int_mm",) if takes_int_mm else (), rival=_rival,
    )  # fmt: skip


def _arguments(
    shape: tuple[int, int, int], out_features: int, residual: bool, quantized: bool, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    levels = {"dtype": torch.int8, "device": device}
    more: dict[str, Any] = {"residual": torch.randn(*shape[:-1], out_features, dtype=dtype, device=device)}
    more = (more if residual else {}) | ({"output_scale": OUTPUT_SCALE} if quantized else {})
    return {
        "x": torch.randint(-128, 128, shape, **levels),
        "weight": torch.randint(-128, 128, (out_features, shape[-1]), **levels),
        "x_scale": X_SCALE, "weight_scale": torch.rand(out_features, device=device) * 0.001 + 0.0001,
        "bias": torch.randn(out_features, dtype=dtype, device=device),
        "out_dtype": torch.int8 if quantized else dtype, **more,
    }  # fmt: skip


def _rival(arguments: Arguments) -> partial[Any]:
    """The layer without quantization."""
    bias = arguments["bias"]
    return partial(F.linear, arguments["x"].to(bias.dtype), arguments["weight"].to(bias.dtype), bias)


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape`` on a device whose blocks get ``shared_memory`` bytes."""
    sizes = (shape["rows"], shape["out_features"], shape["in_features"])
    yield from matrix_configs(shape["aligned"], *sizes, shared_memory)


def matrix_configs(
    is_aligned: int, rows: int, columns: int, inner: int, shared_memory: int
) -> Iterator[dict[str, int]]:  # fmt: skip
    """Of an INT8 product of (rows, inner) by (inner, columns)."""
    if is_aligned == 1:  # byte by byte: nothing gains from large blocks
        for block_m, block_k in product((16, 32), (32, 64)):
            yield {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": block_k, "GROUP": 8, "num_warps": 4, "num_stages": 2}
        return
    depths = ((64, 4), (128, 3))  # about as many bytes under way
    # Wider blocks spill registers.
    for block_m, block_n, (block_k, stages) in product((16, 64, 128), (64, 128), depths):
        if stages * (block_m + block_n) * block_k > shared_memory or block_k > max(64, inner):
            continue
        if (block_m == 16) != (rows < LEAST_ROWS) or block_n > max(64, columns):
            continue
        yield {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": 8,
            "num_warps": 8 if block_m == 128 else 4, "num_stages": stages,
        }  # fmt: skip
