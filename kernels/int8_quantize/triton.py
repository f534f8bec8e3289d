"""The Triton kernel of ``int8_quantize``, and the rounding that every kernel that writes INT8 shares."""

# Triton's kernels take pointers and scalars that have no Python type.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catimage_accel.kernels.dispatch import register_triton_op, wrap_triton
from catimage_accel.kernels.group_norm.layout import is_dense
from catimage_accel.kernels.tuning import launch_config


@triton.jit
def round_to_levels(y, inverse_scale):
    """The INT8 levels of float32 numbers, as float32; NaN becomes -128.

    Clamped first: 1.5 * 2^23 plus or minus a small number has no room for its fraction, and floating-point addition
    rounds half to even. The clamp also keeps the product and the sum from being fused, which would round once only.
    """
    levels = tl.minimum(tl.maximum(y * inverse_scale, -128.0), 127.0)
    levels = tl.where(levels == levels, levels, -128.0)  # NaN passes Triton 3.6's interpreter's clamp, no compiled one
    return (levels + 12582912.0) - 12582912.0


@triton.jit
def int8_quantize_kernel(
    x_ptr,  # (numel,)
    input_scale_ptr,  # (channels,) float32, read if HAS_INPUT_SCALE
    y_ptr,  # (numel,) int8
    numel,
    inner,  # values between one channel and the next
    channels,
    inverse_scale,
    HAS_INPUT_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - first
    x = tl.load(x_ptr + first + lane, mask, 0.0).to(tl.float32)
    if HAS_INPUT_SCALE:
        x *= tl.load(input_scale_ptr + (first + lane) // inner % channels, mask, 0.0)
    tl.store(y_ptr + first + lane, round_to_levels(x, inverse_scale).to(tl.int8), mask)


def int8_quantize_op(x: Tensor, scale: float, input_scale: Tensor | None) -> Tensor:
    """See :func:`catimage_accel.kernels.int8_quantize`."""
    y = _fake(x, scale, input_scale)
    if x.numel() == 0:
        return y
    if not (x.ndim == 4 and is_dense(x)):
        x = x.contiguous()
    inner = y.stride(1) if x.ndim == 4 else 1
    config = launch_config("int8_quantize", x.device, numel=x.numel())
    wrap_triton(int8_quantize_kernel)[(triton.cdiv(x.numel(), config["BLOCK"]),)](
        x, x if input_scale is None else input_scale.contiguous(), y, x.numel(), inner,
        1 if input_scale is None else input_scale.shape[0], 1.0 / scale,
        HAS_INPUT_SCALE=input_scale is not None, **config,
    )  # fmt: skip
    return y


def _fake(x: Tensor, scale: float, input_scale: Tensor | None) -> Tensor:
    if x.ndim == 4 and is_dense(x):
        return torch.empty_like(x, dtype=torch.int8)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


_op = register_triton_op("int8_quantize", int8_quantize_op, _fake)


def int8_quantize(x: Tensor, scale: float, input_scale: Tensor | None) -> Tensor:
    """See :func:`catimage_accel.kernels.int8_quantize`; arguments are validated already."""
    y: Tensor = _op(x, float(scale), input_scale)
    return y
