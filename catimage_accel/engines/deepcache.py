"""DeepCache (arXiv 2312.00858): between refreshes a step runs only the UNet's outermost blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from catimage_accel.engines.protocol import DeepFeatures, TextBatch
from catimage_accel.engines.text import CachedText

__all__ = ["denoise_with_deep_features"]


def denoise_with_deep_features(
    unet: Any,
    text_cache: CachedText,
    sample: Tensor,
    timestep: Tensor,
    text: TextBatch,
    added: Mapping[str, Any] | None,
    deep: DeepFeatures,
) -> Tensor:
    """``UNet2DConditionModel.forward`` with the blocks inside the outermost ones run for ``deep.refresh`` only.

    All rows go through ``conv_in``, the first down block and the last up block together, so rows at a refresh and rows
    between two share those batches. ``deep.features`` is updated in place for the refreshed rows.
    """
    rows = tuple(range(len(sample))) if deep.refresh is None else deep.refresh
    if deep.features is None and len(rows) != len(sample):
        raise ValueError(f"deep.features is None and deep.refresh {rows}; accepted: all {len(sample)} rows at first")
    factor = 2**unet.num_upsamplers
    odd_size = any(side % factor for side in sample.shape[-2:])

    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    extra = unet.get_aug_embed(emb=temb, encoder_hidden_states=text.hidden, added_cond_kwargs=added)
    temb = temb if extra is None else temb + extra
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    hidden = unet.process_encoder_hidden_states(encoder_hidden_states=text.hidden, added_cond_kwargs=added)

    text_cache.current = text
    outer = unet.conv_in(sample)
    inner, skips = _down(unet.down_blocks[0], outer, temb, hidden)
    skips = (outer, *skips)
    last = unet.up_blocks[-1]
    kept = len(last.resnets)

    if rows:
        partial = len(rows) != len(sample)
        if partial:
            index = torch.tensor(rows, device=sample.device)
            text_cache.current = text.rows(rows)
            inner, temb_rows, hidden_rows = inner[index], temb[index], hidden[index]
            deep_skips = tuple(skip[index] for skip in skips[kept:])
        else:
            temb_rows, hidden_rows, deep_skips = temb, hidden, skips[kept:]
        size_after = skips[kept - 1].shape[2:] if odd_size else None
        fresh = _inside(unet, inner, temb_rows, hidden_rows, deep_skips, size_after)
        if partial:
            assert deep.features is not None
            deep.features[index] = fresh
        else:
            deep.features = fresh
        text_cache.current = text

    out = _up(last, deep.features, temb, hidden, skips[:kept], None)
    if unet.conv_norm_out is not None:
        out = unet.conv_act(unet.conv_norm_out(out))
    return unet.conv_out(out)


def _inside(
    unet: Any, sample: Tensor, temb: Tensor, hidden: Tensor, skips: tuple[Tensor, ...], size_after: Any
) -> Tensor:
    """Everything between the first down block and the last up block.

    ``skips`` are the first down block's outputs that the last up block does not take; ``size_after`` is the height and
    width that the last up block expects, where rounding when downsampling loses it.
    """
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
        size = size_after and (skips[-1].shape[2:] if skips else size_after)
        sample = _up(block, sample, temb, hidden, taken, size)
    return sample


def _down(block: Any, sample: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if getattr(block, "has_cross_attention", False):
        return block(hidden_states=sample, temb=temb, encoder_hidden_states=hidden)
    return block(hidden_states=sample, temb=temb)


def _up(block: Any, sample: Any, temb: Tensor, hidden: Tensor, skips: tuple[Tensor, ...], size: Any) -> Tensor:
    text = {"encoder_hidden_states": hidden} if getattr(block, "has_cross_attention", False) else {}
    return block(hidden_states=sample, temb=temb, res_hidden_states_tuple=skips, upsample_size=size, **text)
