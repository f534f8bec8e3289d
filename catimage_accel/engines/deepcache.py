"""DeepCache (arXiv 2312.00858): between refreshes a step runs only the UNet's outermost blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from catimage_accel.engines.protocol import DeepFeatures, TextBatch
from catimage_accel.engines.text import CachedText

__all__ = [
    "PARTS",
    "Outer",
    "UNetParts",
    "deep_rows",
    "denoise_with_deep_features",
    "enter",
    "inside",
    "leave",
    "runs_whole",
]


def runs_whole(step: int, steps: int, interval: int) -> bool:
    """Whether a step of ``steps`` (the first is 0) recomputes the deep features.

    The first of every ``interval`` does, and the last one: what old features spoil there no later step makes good.
    """
    return step % interval == 0 or step == steps - 1


@dataclass(frozen=True, eq=False)
class Outer:
    """What the UNet's outermost blocks hand on for each row.

    ``skips`` (outputs of ``conv_in`` and the first down block) go to the last up block; ``inner``, ``deep_skips`` to
    the blocks between. ``temb`` is the embedded timestep, ``hidden`` the text. ``size_after`` is the height and width
    that the last up block expects, where rounding when downsampling loses it.
    """

    inner: Tensor
    temb: Tensor
    hidden: Tensor
    skips: tuple[Tensor, ...]
    deep_skips: tuple[Tensor, ...]
    size_after: Any = None

    def rows(self, index: Tensor) -> Outer:
        """Those of some rows, as far as :func:`inside` needs them."""
        return replace(
            self, inner=self.inner[index], temb=self.temb[index], hidden=self.hidden[index], skips=(),
            deep_skips=tuple(skip[index] for skip in self.deep_skips),
        )  # fmt: skip


def enter(unet: Any, sample: Tensor, timestep: Tensor, hidden: Tensor, added: Mapping[str, Any] | None) -> Outer:
    """``UNet2DConditionModel.forward`` up to the end of the first down block; ``hidden`` is the text's last state."""
    factor = 2**unet.num_upsamplers
    odd_size = any(side % factor for side in sample.shape[-2:])
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    extra = unet.get_aug_embed(emb=temb, encoder_hidden_states=hidden, added_cond_kwargs=added)
    temb = temb if extra is None else temb + extra
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    hidden = unet.process_encoder_hidden_states(encoder_hidden_states=hidden, added_cond_kwargs=added)

    outer = unet.conv_in(sample)
    inner, skips = _down(unet.down_blocks[0], outer, temb, hidden)
    skips = (outer, *skips)
    kept = len(unet.up_blocks[-1].resnets)
    size_after = skips[kept - 1].shape[2:] if odd_size else None
    return Outer(inner, temb, hidden, skips[:kept], skips[kept:], size_after)


def inside(unet: Any, outer: Outer) -> Tensor:
    """Everything between the first down block and the last up block: the deep features."""
    sample, skips = outer.inner, outer.deep_skips
    temb, hidden = outer.temb, outer.hidden
    for block in unet.down_blocks[1:]:
        sample, more = _down(block, sample, temb, hidden)
        skips = (*skips, *more)
    if unet.mid_block is not None:
        if getattr(unet.mid_block, "has_cross_attention", False):
            sample = unet.mid_block(sample, temb, encoder_hidden_states=hidden)
        else:
            sample = unet.mid_block(sample, temb)
    for block in unet.up_blocks[:-1]:
        taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        size = outer.size_after and (skips[-1].shape[2:] if skips else outer.size_after)
        sample = _up(block, sample, temb, hidden, taken, size)
    return sample


def leave(unet: Any, outer: Outer, features: Tensor) -> Tensor:
    """The last up block and what follows it: the UNet's output."""
    out = _up(unet.up_blocks[-1], features, outer.temb, outer.hidden, outer.skips, None)
    if unet.conv_norm_out is not None:
        out = unet.conv_act(unet.conv_norm_out(out))
    return unet.conv_out(out)


def deep_rows(deep: DeepFeatures, rows: int) -> tuple[int, ...]:
    """The rows whose features this step computes; ValueError if the others have none yet."""
    fresh = tuple(range(rows)) if deep.refresh is None else deep.refresh
    if deep.features is None and len(fresh) != rows:
        raise ValueError(f"deep.features is None and deep.refresh {fresh}; accepted: all {rows} rows at first")
    return fresh


UNetParts = tuple[Callable[..., Outer], Callable[..., Tensor], Callable[..., Tensor]]
PARTS: UNetParts = (enter, inside, leave)


def denoise_with_deep_features(
    unet: Any,
    text_cache: CachedText,
    sample: Tensor,
    timestep: Tensor,
    text: TextBatch,
    added: Mapping[str, Any] | None,
    deep: DeepFeatures,
    parts: UNetParts,
) -> Tensor:
    """``UNet2DConditionModel.forward`` with the blocks inside the outermost ones run for ``deep.refresh`` only.

    All rows go through ``conv_in``, the first down block and the last up block together, so rows at a refresh and rows
    between two share those batches. ``deep.features`` is updated in place for the refreshed rows. ``parts`` are the
    functions of those names, or what was compiled of them.
    """
    rows = deep_rows(deep, len(sample))
    enter, inside, leave = parts
    text_cache.current = text
    outer = enter(unet, sample, timestep, text.hidden, added)
    if rows and len(rows) == len(sample):
        deep.features = inside(unet, outer)
    elif rows:
        assert deep.features is not None
        index = torch.tensor(rows, device=sample.device)
        text_cache.current = text.rows(rows)
        deep.features[index] = inside(unet, outer.rows(index))
        text_cache.current = text
    assert deep.features is not None
    return leave(unet, outer, deep.features)


def _down(block: Any, sample: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if getattr(block, "has_cross_attention", False):
        return block(hidden_states=sample, temb=temb, encoder_hidden_states=hidden)
    return block(hidden_states=sample, temb=temb)


def _up(block: Any, sample: Any, temb: Tensor, hidden: Tensor, skips: tuple[Tensor, ...], size: Any) -> Tensor:
    text = {"encoder_hidden_states": hidden} if getattr(block, "has_cross_attention", False) else {}
    return block(hidden_states=sample, temb=temb, res_hidden_states_tuple=skips, upsample_size=size, **text)
