"""``int8_linear``: a linear layer on INT8 activations and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.int8_linear import int_mm, reference
from catimage_accel.kernels.int8_linear.shape import tuned_shape
from catimage_accel.kernels.int8_linear.validation import validate
from catimage_accel.kernels.tuning.impl import measured_impl

__all__ = ["int8_linear"]


def int8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    output_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """``(x @ weight.T) * x_scale * weight_scale + bias + residual``, optionally quantized again.

    The integer product is exact (int32); the rest is float32, rounded once to ``out_dtype``.

    Args:
        x: (..., in_features) int8; in_features up to 131,071, so that int32 holds every sum.
        weight: (out_features, in_features) int8, device of ``x``.
        x_scale: The real value of one level of ``x``, amax / 127; above 0.
        weight_scale: (out_features,) float32, device of ``x``: the same of each row of ``weight``.
        bias: (out_features,), float16, bfloat16 or float32, device of ``x``; ``None`` for zeros.
        residual: (..., out_features), dtypes as of ``bias``; ``None`` adds nothing.
        out_dtype: float16, bfloat16, float32 or int8; the reference also takes float64, for exact results.
        output_scale: With an ``out_dtype`` of int8 (which needs it) the result is its levels, as of ``int8_quantize``;
            with another, the real values of these levels. ``None`` quantizes nothing.
        impl: "reference", "triton", "int_mm" (``torch._int_mm``, then torch's own ops; more than 16 rows, feature
            counts that are multiples of 8) or ``None``, the best available.

    Returns:
        (..., out_features), contiguous, ``out_dtype``. There is no gradient.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(x, weight, x_scale, weight_scale, bias, residual, out_dtype, output_scale)
    takes_int_mm = int_mm.takes(x, weight)
    if impl == "int_mm" and not takes_int_mm:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; impl 'int_mm' accepts more than 16 rows "
            "and feature counts that are multiples of 8"
        )
    if impl == "triton" and out_dtype == torch.float64:
        raise ValueError("out_dtype is torch.float64; accepted by impl 'reference' only")
    chosen = choose_impl(
        impl, "x", x, weight_scale, bias, residual, triton_dtypes=(torch.int8,),
        libraries=("int_mm",) if takes_int_mm else (),
        measured=lambda: measured_impl("int8_linear", x.device, **tuned_shape(x, weight)),
    )  # fmt: skip
    arguments = (x, weight, x_scale, weight_scale, bias, residual, out_dtype, output_scale)
    if chosen == "int_mm":
        return int_mm.int8_linear(*arguments)
    if chosen == "triton" and out_dtype != torch.float64:
        from catimage_accel.kernels.int8_linear import triton

        return triton.int8_linear(*arguments)
    return reference.int8_linear(*arguments)
