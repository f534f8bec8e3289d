"""``geglu``: the gated activation of a transformer's feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.geglu import reference
from catimage_accel.kernels.geglu.validation import validate

__all__ = ["geglu"]


def geglu(x: Tensor, *, output_scale: float | None = None, impl: str | None = None) -> Tensor:
    """``value * gelu(gate)``, where ``value`` and ``gate`` are the two halves of the last dimension.

    The GELU is the exact one, ``gate / 2 * (1 + erf(gate / sqrt(2)))`` (arXiv 2002.05202).

    Args:
        x: (..., 2 * width), any floating-point dtype; need not be contiguous.
        output_scale: The real value of one INT8 level of the result, as of ``int8_quantize``: int8 is written, for a
            quantized layer to read. ``None`` quantizes nothing.
        impl: "reference" (torch's ``gelu`` and product), "triton" (float16, bfloat16 or float32) or ``None``, the best
            available. Where a gradient is needed the reference runs.

    Returns:
        (..., width), contiguous, dtype of ``x``; int8 where there is an ``output_scale``.

    Raises:
        ValueError: The shape, dtype or device is not accepted; names the argument, its value and what is.
    """
    validate(x, output_scale)
    if choose_impl(impl, "x", x) == "triton":
        from catimage_accel.kernels.geglu import triton

        return triton.geglu(x, output_scale)
    return reference.geglu(x, output_scale)
