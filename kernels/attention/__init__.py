"""``attention``: scaled dot-product attention, self and cross."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.attention import reference
from catimage_accel.kernels.attention.shape import tuned_shape
from catimage_accel.kernels.attention.validation import validate
from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.tuning.impl import measured_impl

__all__ = ["MAX_TRITON_HEAD_DIM", "attention"]

MAX_TRITON_HEAD_DIM = 256
CUDA_HEAD_DIMS = (40, 64, 80, 160)
CUDA_DTYPES = (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str | None = None) -> Tensor:
    """``softmax(scale * q @ k.T) @ v`` for every batch and head, without a mask.

    Args:
        q: Queries, (batch, queries, heads, head_dim), any floating-point dtype; need not be contiguous.
        k: Keys, (batch, keys, heads, head_dim), dtype and device of ``q``.
        v: Values, shape, dtype and device of ``k``.
        scale: Factor on the scores; ``None`` is ``1 / sqrt(head_dim)``.
        impl: "reference" (torch's ``scaled_dot_product_attention``), "triton" (float16, bfloat16 or float32, head_dim
            up to 256), "cuda" (float16 or bfloat16, head_dim 40, 64, 80 or 160) or ``None``, the best available. Where
            a gradient is needed the reference runs.

    Returns:
        (batch, queries, heads, head_dim), dtype of ``q``; its strides are the implementation's.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(q, k, v, scale)
    head_dim = q.shape[3]
    scale = head_dim**-0.5 if scale is None else float(scale)
    takes_cuda = head_dim in CUDA_HEAD_DIMS
    if impl == "cuda" and not takes_cuda:
        raise ValueError(f"q has head_dim {head_dim}; impl 'cuda' accepts {', '.join(map(str, CUDA_HEAD_DIMS))}")
    chosen = choose_impl(
        impl, "q", q, k, v, cuda_dtypes=CUDA_DTYPES if takes_cuda else (),
        measured=lambda: measured_impl("attention", q.device, **tuned_shape(q, k)),
    )  # fmt: skip
    if chosen == "cuda":
        from catimage_accel.kernels.attention import cuda

        return cuda.attention(q, k, v, scale=scale)
    if chosen == "triton" and head_dim > MAX_TRITON_HEAD_DIM:
        if impl is not None:
            raise ValueError(f"q has head_dim {head_dim}; impl 'triton' accepts up to {MAX_TRITON_HEAD_DIM}")
        chosen = "reference"
    if chosen == "triton":
        from catimage_accel.kernels.attention import triton

        return triton.attention(q, k, v, scale=scale)
    return reference.attention(q, k, v, scale=scale)
