"""Robust training: every block of a UNet that can be left out is, now and then, so that each can be valued alone.

SnapFusion (arXiv 2306.00980), section 3.1. A network that has never missed a block breaks without any one of them, and
so says nothing of what a network trained without it would be worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from catimage_accel.efficient_unet import left_out


class OptionalBlock(nn.Module):
    """A ResNet or attention block that runs if ``active``, and else does what a block left out does."""

    def __init__(self, block: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.block, self.skip, self.active = block, skip, True

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return (self.block if self.active else self.skip)(*inputs, **named)


@contextmanager
def optional_blocks(unet: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, OptionalBlock]]:
    """``unet`` with its blocks at ``paths`` made optional, by path; as it was afterwards."""
    wrapped = {path: OptionalBlock(unet.get_submodule(path), left_out(unet, path)) for path in paths}
    try:
        for path, block in wrapped.items():
            unet.set_submodule(path, block, strict=True)
        yield wrapped
    finally:
        for path, block in wrapped.items():
            unet.set_submodule(path, block.block, strict=True)


def plain_name(name: str) -> str:
    """A parameter's name in the UNet, from its name in a UNet with optional blocks."""
    return name.replace(".block.", ".")


def leaving_out(
    blocks: dict[str, OptionalBlock], keep: tuple[float, float], loss: Callable[[torch.Generator], Tensor]
) -> Callable[[int, torch.Generator], Tensor]:
    """A loss function for the trainer: ``loss`` of a batch for which each block was kept with one probability.

    The probability is drawn from ``keep`` anew for every batch, so that nearly whole and thin networks are trained.
    """

    def loss_fn(_: int, generator: torch.Generator) -> Tensor:
        low, high = keep
        probability = low + (high - low) * torch.rand((), generator=generator)
        chosen = torch.rand(len(blocks), generator=generator) < probability
        with only(blocks, [path for path, kept in zip(blocks, chosen.tolist(), strict=True) if kept]):
            return loss(generator)

    return loss_fn


@contextmanager
def only(blocks: dict[str, OptionalBlock], active: Iterable[str]) -> Iterator[None]:
    """Of the optional blocks those of ``active`` alone run; all of them afterwards."""
    chosen = set(active)
    for path, block in blocks.items():
        block.active = path in chosen
    try:
        yield
    finally:
        for block in blocks.values():
            block.active = True
