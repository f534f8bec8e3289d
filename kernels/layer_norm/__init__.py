"""``layer_norm``: layer normalisation, with the residual sum that comes before it."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.layer_norm import reference
from catimage_accel.kernels.layer_norm.validation import validate

__all__ = ["MAX_TRITON_WIDTH", "layer_norm"]

MAX_TRITON_WIDTH = 16384


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    output_scale: float | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    output_scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    output_scale: float | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(z - mean) / sqrt(var + eps) * weight + bias`` over the last dimension of ``z = x + residual``.

    The variance is the biased one of ``torch.nn.LayerNorm`` (arXiv 1607.06450).

    Args:
        x: (..., width), any floating-point dtype; need not be contiguous.
        weight: (width,), dtype and device of ``x``, or ``None`` for ones.
        bias: (width,), dtype and device of ``x``, or ``None`` for zeros.
        eps: 0 or more.
        residual: Added to ``x`` first; shape, dtype and device of ``x``. ``None`` adds nothing.
        output_scale: The real value of one INT8 level of the result, as of ``int8_quantize``: int8 is written, for a
            quantized layer to read. ``None`` quantizes nothing.
        impl: "reference" (torch's sum and ``layer_norm``), "triton" (float16, bfloat16 or float32, width up to 16384)
            or ``None``, the best available. Where a gradient is needed the reference runs.

    Returns:
        The normalised tensor, shape and dtype of ``x``, or int8 where there is an ``output_scale``; with a residual,
        that and ``x + residual``, which is never quantized.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(x, weight, bias, eps, residual, output_scale)
    chosen = choose_impl(impl, "x", x, weight, bias, residual)
    if chosen == "triton" and x.shape[-1] > MAX_TRITON_WIDTH:
        if impl is not None:
            raise ValueError(f"x has width {x.shape[-1]}; impl 'triton' accepts up to {MAX_TRITON_WIDTH}")
        chosen = "reference"
    if chosen == "triton":
        from catimage_accel.kernels.layer_norm import triton

        if residual is None:
            return triton.layer_norm(x, weight, bias, eps, output_scale)
        return triton.add_layer_norm(x, residual, weight, bias, eps, output_scale)
    if residual is None:
        return reference.layer_norm(x, weight, bias, eps, output_scale)
    return reference.add_layer_norm(x, residual, weight, bias, eps, output_scale)
