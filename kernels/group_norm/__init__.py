"""``group_norm``: group normalisation with an optional SiLU."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels import cpu as cpu_library
from catimage_accel.kernels.dispatch import KERNEL_DTYPES, choose_impl
from catimage_accel.kernels.group_norm import reference
from catimage_accel.kernels.group_norm.layout import suits_cpu_kernel, tuned_shape
from catimage_accel.kernels.group_norm.validation import validate
from catimage_accel.kernels.tuning.impl import measured_impl

__all__ = ["group_norm"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    shift: Tensor | None = None,
    output_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """``activation((z - mean) / sqrt(var + eps) * weight + bias)``, moments per image and group of channels of z.

    ``z`` is ``x``, or ``x + shift`` where there is one: how a diffusion UNet's block takes its time embedding. The
    variance is the biased one of ``torch.nn.GroupNorm`` (arXiv 1803.08494). A result does not depend on the other
    images of the batch, and the same input gives the same bits.

    Args:
        x: (batch, channels, ...), any floating-point dtype, in any layout; a dense channels-last one (4D or other) is
            kept in the result.
        num_groups: Divides the channels.
        weight: (channels,), dtype and device of ``x``, or ``None`` for ones.
        bias: (channels,), dtype and device of ``x``, or ``None`` for zeros.
        eps: 0 or more.
        activation: "silu" or ``None``.
        shift: (batch, channels), dtype and device of ``x``, or ``None`` for zeros.
        output_scale: The real value of one INT8 level of the result, as of ``int8_quantize``: int8 is written, for a
            quantized layer to read. ``None`` quantizes nothing.
        impl: "reference" (torch's ``group_norm``, then ``silu``), "triton", "cuda" (float16, bfloat16 or float32, no
            ``output_scale``), "cpu" (float32 or bfloat16, no ``output_scale``) or ``None``, the best available. All but
            the reference do without rounding the sum with ``shift`` to the dtype. Where a gradient is needed the
            reference runs.

    Returns:
        Shape and dtype of ``x``; int8 where there is an ``output_scale``.

    Raises:
        ValueError: An argument's shape, dtype, device or value is not accepted; names it, its value and what is.
    """
    validate(x, num_groups, weight, bias, eps, activation, shift, output_scale)
    takes_cpu = output_scale is None and (impl is not None or suits_cpu_kernel(x))
    chosen = choose_impl(
        impl, "x", x, weight, bias, shift, cuda_dtypes=KERNEL_DTYPES if output_scale is None else (),
        cpu_dtypes=cpu_library.DTYPES if takes_cpu else (),
        measured=lambda: measured_impl("group_norm", x.device, **tuned_shape(x)),
    )  # fmt: skip
    if chosen == "cuda":
        from catimage_accel.kernels.group_norm import cuda

        return cuda.group_norm(x, num_groups, weight, bias, eps, activation=activation, shift=shift)
    if chosen == "cpu":
        from catimage_accel.kernels.group_norm import cpu

        return cpu.group_norm(x, num_groups, weight, bias, eps, activation=activation, shift=shift)
    if chosen == "triton":
        from catimage_accel.kernels.group_norm import triton

        return triton.group_norm(
            x, num_groups, weight, bias, eps, activation=activation, shift=shift, output_scale=output_scale
        )
    return reference.group_norm(
        x, num_groups, weight, bias, eps, activation=activation, shift=shift, output_scale=output_scale
    )
