"""Takes channels out of an AutoencoderKL's decoder: those that are written to least, everywhere they occur."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from catimage_accel.efficient_decoder import EfficientDecoderKL

Channels: TypeAlias = Tensor
"""Indices of kept channels, ascending, int64."""


def pruned_decoder(vae: AutoencoderKL, keep: float = 0.5) -> EfficientDecoderKL:
    """A copy of ``vae`` whose decoder has ``keep`` (0 to 1] of the channels in every layer; the encoder is whole.

    Channels that layers add into each other are kept or dropped together, by the norm of all weights that write them;
    those inside a ResNet block by the norm of the weights of its first convolution. The weights that stay are as they
    were, so the decoder is a start for training and no more. GroupNorm has the most groups, up to what it had, that
    divide the new channels. ValueError for ``keep`` out of range, or so small that a layer is left without a channel.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}; accepted: above 0, at most 1")
    wide = list(vae.config.block_out_channels)
    narrow = [round(keep * channels) for channels in wide]
    if min(narrow) < 1:
        raise ValueError(f"keep is {keep}, which leaves {narrow} of {wide} channels; accepted: at least 1 in a block")
    common = math.gcd(*narrow)
    groups = max(number for number in range(1, vae.config.norm_num_groups + 1) if common % number == 0)
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config |= {"decoder_block_out_channels": tuple(narrow), "decoder_norm_num_groups": groups}
    made = EfficientDecoderKL(**config)
    made = made.to(device=vae.device, dtype=vae.dtype)
    for part in ("encoder", "quant_conv", "post_quant_conv"):
        if getattr(vae, part, None) is not None:
            getattr(made, part).load_state_dict(getattr(vae, part).state_dict())
    _copy_decoder(vae.decoder, made.decoder)
    return made.train(vae.training)


@torch.no_grad()
def _copy_decoder(old: nn.Module, new: nn.Module) -> None:
    # What reaches the first up block is one stream, which that block adds to as long as its channels stay as many.
    writers = [old.conv_in, *(resnet.conv2 for resnet in old.mid_block.resnets)]
    writers += [attention.to_out[0] for attention in old.mid_block.attentions if attention is not None]
    writers += [one.conv2 for one in takewhile(lambda one: one.conv_shortcut is None, old.up_blocks[0].resnets)]
    stream = _strongest(writers, new.conv_in.out_channels)
    _copy(old.conv_in, new.conv_in, stream, None)
    for resnet, narrow in zip(old.mid_block.resnets, new.mid_block.resnets, strict=True):
        _copy_resnet(resnet, narrow, stream, stream)
    for attention, narrow in zip(old.mid_block.attentions, new.mid_block.attentions, strict=True):
        if attention is not None:
            _copy_attention(attention, narrow, stream)
    for block, narrow in zip(old.up_blocks, new.up_blocks, strict=True):
        stream = _copy_up_block(block, narrow, stream)
    _copy_norm(old.conv_norm_out, new.conv_norm_out, stream)
    _copy(old.conv_out, new.conv_out, None, stream)


def _copy_up_block(old: nn.Module, new: nn.Module, stream: Channels) -> Channels:
    """Copies the block that ``stream`` enters; returns what leaves it."""
    for index, (resnet, narrow) in enumerate(zip(old.resnets, new.resnets, strict=True)):
        out = stream
        if resnet.conv_shortcut is not None:
            writers = [resnet.conv_shortcut, *(one.conv2 for one in old.resnets[index:])]
            out = _strongest(writers, narrow.conv2.out_channels)
        _copy_resnet(resnet, narrow, stream, out)
        stream = out
    for sampler, narrow in zip(old.upsamplers or [], new.upsamplers or [], strict=True):
        out = _strongest([sampler.conv], narrow.conv.out_channels)  # the next block's ResNets add to it, too
        _copy(sampler.conv, narrow.conv, out, stream)
        stream = out
    return stream


def _copy_resnet(old: nn.Module, new: nn.Module, stream: Channels, out: Channels) -> None:
    inner = _strongest([old.conv1], new.conv1.out_channels)
    _copy_norm(old.norm1, new.norm1, stream)
    _copy(old.conv1, new.conv1, inner, stream)
    _copy_norm(old.norm2, new.norm2, inner)
    _copy(old.conv2, new.conv2, out, inner)
    if old.conv_shortcut is not None:
        _copy(old.conv_shortcut, new.conv_shortcut, out, stream)


def _copy_attention(old: nn.Module, new: nn.Module, stream: Channels) -> None:
    matched = _strongest([old.to_q, old.to_k], new.to_q.out_features)
    carried = _strongest([old.to_v], new.to_v.out_features)
    _copy_norm(old.group_norm, new.group_norm, stream)
    _copy(old.to_q, new.to_q, matched, stream)
    _copy(old.to_k, new.to_k, matched, stream)
    _copy(old.to_v, new.to_v, carried, stream)
    _copy(old.to_out[0], new.to_out[0], stream, carried)


def _strongest(layers: Iterable[nn.Module], number: int) -> Channels:
    """The ``number`` output channels that all ``layers`` together write with the largest weights."""
    norm = sum(layer.weight.float().flatten(1).square().sum(1) for layer in layers)
    assert isinstance(norm, Tensor)
    return norm.topk(number).indices.sort().values


def _copy(old: nn.Module, new: nn.Module, out: Channels | None, into: Channels | None) -> None:
    weight, bias = old.weight, old.bias
    if into is not None:
        weight = weight[:, into]
    if out is not None:
        weight, bias = weight[out], None if bias is None else bias[out]
    new.weight.copy_(weight)
    if bias is not None:
        new.bias.copy_(bias)


def _copy_norm(old: nn.Module, new: nn.Module, channels: Channels) -> None:
    new.weight.copy_(old.weight[channels])
    new.bias.copy_(old.bias[channels])
