"""The convolutions of SD1.5's and SDXL's UNets, and the launch configs to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from catimage_accel.kernels.int8_conv import int8_conv
from catimage_accel.kernels.int8_conv.shape import out_shape
from catimage_accel.kernels.int8_linear.shape import aligned
from catimage_accel.kernels.int8_linear.workload import OUTPUT_SCALE, X_SCALE, matrix_configs
from catimage_accel.kernels.tuning.workload import STAGES, Arguments, Stage, Workload


def workloads(batch: int, dtype: torch.dtype, stages: Iterable[Stage] = STAGES) -> Iterator[Workload]:
    """Of every stage: a residual block's convolutions, plain and after a concatenation, its shortcut, downsampling."""
    for stage in stages:
        for kind, in_channels, kernel, stride, residual in (
            ("3x3", stage.channels, 3, 1, True),
            ("3x3 of two", 2 * stage.channels, 3, 1, False),
            ("1x1 of two", 2 * stage.channels, 1, 1, False),
            ("3x3 stride 2", stage.channels, 3, 2, False),
        ):
            shape = (batch, in_channels, stage.side, stage.side)
            name = f"{stage.name} {kind}, batch {batch}"
            yield of_size(name, dtype, shape, stage.channels, kernel, stride, kernel // 2, residual)


def of_size(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    residual: bool,
    quantized: bool = False,
) -> Workload:
    """One call on random integers in channels-last memory, into ``dtype``, or ``quantized`` again into int8."""
    image = torch.empty(shape, device="meta")
    filters = (out_channels, shape[1], kernel, kernel)
    out = out_shape(image, torch.empty(filters, device="meta"), stride, padding)
    rows, taps = out[0] * out[2] * out[3], kernel**2
    read = image.numel() + out_channels * taps * shape[1]
    return Workload(
        "int8_conv", name, shape[0], dtype, int8_conv,
        partial(_arguments, shape, filters, out, {"stride": stride, "padding": padding}, residual, quantized),
        {
            "aligned": aligned(shape[1], out_channels), "rows": rows, "out_channels": out_channels, "taps": taps,
            "in_channels": shape[1],
        },
        flops=2 * rows * out_channels * taps * shape[1],
        bytes=read + (1 + residual) * rows * out_channels * dtype.itemsize,
        exact_as_is=("x", "weight", "weight_scale"),
        unquantized={"output_scale": None, "out_dtype": torch.float32} if quantized else {}, rival=_rival,
    )  # fmt: skip


def _arguments(
    shape: tuple[int, ...], filters: tuple[int, ...], out: tuple[int, ...], how: dict[str, int], residual: bool,
    quantized: bool, dtype: torch.dtype, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    last, levels = torch.channels_last, {"dtype": torch.int8, "device": device}
    added = {"residual": torch.randn(out, dtype=dtype, device=device).contiguous(memory_format=last)}
    return {
        "x": torch.randint(-128, 128, shape, **levels).contiguous(memory_format=last),
        "weight": torch.randint(-128, 128, filters, **levels).contiguous(memory_format=last),
        "x_scale": X_SCALE, "weight_scale": torch.rand(filters[0], device=device) * 0.001 + 0.0001,
        "bias": torch.randn(filters[0], dtype=dtype, device=device), **how,
        "out_dtype": torch.int8 if quantized else dtype, **(added if residual else {}),
        **({"output_scale": OUTPUT_SCALE} if quantized else {}),
    }  # fmt: skip


def _rival(arguments: Arguments) -> partial[Any]:
    """The layer without quantization, in channels-last memory."""
    bias, how = arguments["bias"], (arguments["stride"], arguments["padding"])
    return partial(F.conv2d, arguments["x"].to(bias.dtype), arguments["weight"].to(bias.dtype), bias, *how)


def configs(shape: dict[str, int], shared_memory: int) -> Iterator[dict[str, int]]:
    """Launch configs that may suit ``shape`` on a device whose blocks get ``shared_memory`` bytes."""
    sizes = (shape["rows"], shape["out_channels"], shape["in_channels"])
    yield from matrix_configs(shape["aligned"], *sizes, shared_memory)
