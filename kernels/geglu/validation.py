"""What ``geglu`` accepts."""

from __future__ import annotations

from torch import Tensor


def validate(x: Tensor) -> None:
    """Raises ValueError saying what is off and what is accepted."""
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; "
            "accepted: a floating-point (..., 2 * width) tensor with width of at least 1"
        )
