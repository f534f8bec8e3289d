"""Sizes of ``int8_conv``: of its result, and what its launch configs are chosen by."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.int8_linear.shape import aligned


def out_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """(batch, out_channels, out height, out width)."""
    height, width = (
        (x.shape[side] + 2 * padding - weight.shape[side]) // stride + 1 for side in (2, 3)
    )  # fmt: skip
    return x.shape[0], weight.shape[0], height, width


def tuned_shape(out: tuple[int, int, int, int], weight: Tensor) -> dict[str, int]:
    """As ``launch_config`` takes it, the most decisive first."""
    out_channels, in_channels, height, width = weight.shape
    return {
        "aligned": aligned(in_channels, out_channels), "rows": out[0] * out[2] * out[3], "out_channels": out_channels,
        "taps": height * width, "in_channels": in_channels,
    }  # fmt: skip
