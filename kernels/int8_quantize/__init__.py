"""``int8_quantize``: floating-point activations to INT8 with a static scale."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.int8_quantize import reference
from catimage_accel.kernels.int8_quantize.validation import validate

__all__ = ["int8_quantize"]


def int8_quantize(x: Tensor, scale: float, *, input_scale: Tensor | None = None, impl: str | None = None) -> Tensor:
    """``clamp(round_half_even(x * input_scale / scale), -128, 127)`` as int8.

    Computed in float32, with the reciprocal of ``scale``. What is beyond the range saturates; NaN becomes -128.

    Args:
        x: Any shape, any floating-point dtype, in any layout; a dense channels-last one is kept in the result.
        scale: The real value of one level, amax / 127; above 0.
        input_scale: (channels,) float32, device of ``x``: SmoothQuant's factors (arXiv 2211.10438), along the last
            dimension, or along the second one of a 4D ``x``. ``None`` for ones.
        impl: "reference" (torch's own ops), "triton" (float16, bfloat16 or float32) or ``None``, the best available.

    Returns:
        int8, shape of ``x``. There is no gradient.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(x, scale, input_scale)
    if choose_impl(impl, "x", x, input_scale) == "triton":
        from catimage_accel.kernels.int8_quantize import triton

        return triton.int8_quantize(x, scale, input_scale)
    return reference.int8_quantize(x, scale, input_scale)
