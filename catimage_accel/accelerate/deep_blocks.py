"""The blocks of a UNet that stand still between refreshes of its deep features (DeepCache, arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor

from catimage_accel.accelerate.modules import named_like


class DeepFeatures:
    """What the blocks of one UNet ask: whether they stand still in this call, and what is kept of the last refresh."""

    def __init__(self) -> None:
        self.skips = False
        self.kept: Tensor | None = None

    def __reduce__(self) -> tuple[type[DeepFeatures], tuple[()]]:
        return DeepFeatures, ()  # copies and pickles start empty


def _features_of(block: Any) -> DeepFeatures | None:
    """None where someone held on to a block's ``forward`` for longer than it was swapped in."""
    return getattr(block, "deep_features", None)


def _standing_still(plain: Callable[..., Any], instead: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    """``plain``, or what ``instead`` says of the block and its hidden states where the block stands still."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = _features_of(self)
        if features is None or not features.skips:
            return plain(self, hidden_states, *args, **kwargs)
        return instead(self, hidden_states)

    return forward


def _keeping(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``plain``, whose result is kept."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, hidden_states, *args, **kwargs)
        features = _features_of(self)
        if features is not None:
            features.kept = _own(self, result)
        return result

    return forward


def _nothing(block: Any, hidden_states: Tensor) -> Tensor:
    return hidden_states.new_zeros(())


def _nothing_but_skips(block: Any, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    # Nobody looks at the skip connections, but ControlNets add to each: a number takes anything.
    number = len(block.resnets) + (block.downsamplers is not None)
    return hidden_states, (_nothing(block, hidden_states),) * number


def _kept(block: Any, hidden_states: Tensor) -> Tensor:
    return _own(block, block.deep_features.kept)


def _own(block: Any, features: Tensor) -> Tensor:
    """``features``, safe from the block after: FreeU scales in place what it is given."""
    return features if getattr(block, "b1", None) is None else features.clone()


@named_like(DownBlock2D)
class SkippingDownBlock2D(DownBlock2D):
    """A ``DownBlock2D`` that stands still between refreshes."""

    forward = _standing_still(DownBlock2D.forward, _nothing_but_skips)


@named_like(CrossAttnDownBlock2D)
class SkippingCrossAttnDownBlock2D(CrossAttnDownBlock2D):
    """A ``CrossAttnDownBlock2D`` that stands still between refreshes."""

    forward = _standing_still(CrossAttnDownBlock2D.forward, _nothing_but_skips)


@named_like(UNetMidBlock2DCrossAttn)
class SkippingMidBlock2DCrossAttn(UNetMidBlock2DCrossAttn):
    """A ``UNetMidBlock2DCrossAttn`` that stands still between refreshes."""

    forward = _standing_still(UNetMidBlock2DCrossAttn.forward, _nothing)


@named_like(UpBlock2D)
class SkippingUpBlock2D(UpBlock2D):
    """An ``UpBlock2D`` that stands still between refreshes."""

    forward = _standing_still(UpBlock2D.forward, _nothing)


@named_like(CrossAttnUpBlock2D)
class SkippingCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """A ``CrossAttnUpBlock2D`` that stands still between refreshes."""

    forward = _standing_still(CrossAttnUpBlock2D.forward, _nothing)


@named_like(UpBlock2D)
class KeepingUpBlock2D(UpBlock2D):
    """The ``UpBlock2D`` whose result is kept between refreshes."""

    forward = _standing_still(_keeping(UpBlock2D.forward), _kept)


@named_like(CrossAttnUpBlock2D)
class KeepingCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """The ``CrossAttnUpBlock2D`` whose result is kept between refreshes."""

    forward = _standing_still(_keeping(CrossAttnUpBlock2D.forward), _kept)


SKIPPING: dict[type, type] = {
    DownBlock2D: SkippingDownBlock2D,
    CrossAttnDownBlock2D: SkippingCrossAttnDownBlock2D,
    UNetMidBlock2DCrossAttn: SkippingMidBlock2DCrossAttn,
    UpBlock2D: SkippingUpBlock2D,
    CrossAttnUpBlock2D: SkippingCrossAttnUpBlock2D,
}
KEEPING: dict[type, type] = {UpBlock2D: KeepingUpBlock2D, CrossAttnUpBlock2D: KeepingCrossAttnUpBlock2D}
ORIGINALS = {swapped: (plain, ("deep_features",)) for kinds in (SKIPPING, KEEPING) for plain, swapped in kinds.items()}
"""Class that stands still -> the class it stands in for, and the attributes that its blocks were given."""


def check_deep_blocks(unet: Any, tier: str) -> None:
    """Raises ValueError where the UNet has no deep blocks, or some that can't stand still."""
    if len(unet.up_blocks) < 2:
        raise ValueError(
            f"tier is {tier!r}, which skips what lies between the first and the last blocks of a UNet, but this one "
            "has one up block; accepted: tier='lossless'"
        )
    for path, block, kinds in _deep_blocks(unet):
        if type(block) not in kinds and type(block) not in kinds.values():
            raise ValueError(
                f"tier is {tier!r}, but unet.{path} is a {type(block).__name__}; accepted: blocks of the kinds "
                f"{', '.join(kind.__name__ for kind in kinds)}, or tier='lossless'"
            )


def swap_deep_blocks(unet: Any) -> DeepFeatures:
    """Gives the deep blocks, of their own classes, those that stand still; returns what they ask."""
    features = DeepFeatures()
    for _, block, kinds in _deep_blocks(unet):
        block.__class__ = kinds[type(block)]
        block.deep_features = features
    return features


def _deep_blocks(unet: Any) -> list[tuple[str, Any, dict[type, type]]]:
    """Path, block and the classes that it may get."""
    last = len(unet.up_blocks) - 2
    down = [(f"down_blocks.{index}", block, SKIPPING) for index, block in enumerate(unet.down_blocks) if index > 0]
    middle = [] if unet.mid_block is None else [("mid_block", unet.mid_block, SKIPPING)]
    up = [
        (f"up_blocks.{index}", block, KEEPING if index == last else SKIPPING)
        for index, block in enumerate(unet.up_blocks[:-1])
    ]
    return [*down, *middle, *up]
