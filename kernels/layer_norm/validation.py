"""What ``layer_norm`` accepts."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import check_scale
from catimage_accel.kernels.validation import check_eps, check_same_kind


def validate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    output_scale: float | None,
) -> None:
    """Raises ValueError naming the first argument that is off, its value and what is accepted."""
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "accepted: a floating-point (..., width) tensor with width of at least 1"
        )
    width = (x.shape[-1],)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; accepted: x's, {tuple(x.shape)}, or None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != width:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted: {tuple(width)}, one per column, or None"
            )
    check_same_kind("x", x, weight=weight, bias=bias, residual=residual)
    check_eps(eps)
    if output_scale is not None:
        check_scale("output_scale", output_scale)
