"""What ``geglu`` accepts."""

from __future__ import annotations

from torch import Tensor

from catimage_accel.kernels.int8_quantize.scale import check_scale


def validate(x: Tensor, output_scale: float | None) -> None:
    """Raises ValueError saying what is off and what is accepted."""
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "accepted: a floating-point (..., 2 * width) tensor with width of at least 1"
        )
    if output_scale is not None:
        check_scale("output_scale", output_scale)
