"""What ``group_norm`` accepts."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import check_scale
from catimage_accel.kernels.validation import check_eps, check_same_kind

ACTIVATIONS = (None, "silu")


def validate(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    shift: Tensor | None,
    output_scale: float | None,
) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "accepted: a floating-point (batch, channels, ...) tensor"
        )
    channels = x.shape[1]
    if num_groups < 1 or channels == 0 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; accepted: a divisor of x's {channels} channels")
    images = (x.shape[0], channels)
    if shift is not None and shift.shape != images:
        raise ValueError(
            f"shift has shape {tuple(shift.shape)}; accepted: {tuple(images)}, one per image and channel, or None"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted: ({channels},), one per channel, or None"
            )
    check_same_kind("x", x, weight=weight, bias=bias, shift=shift)
    check_eps(eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(map(repr, ACTIVATIONS))}")
    if output_scale is not None:
        check_scale("output_scale", output_scale)
