"""A diffusers UNet some of whose ResNet and attention blocks are left out, or run several times over.

Such are the networks that SnapFusion (arXiv 2306.00980) searches: a UNet's stages stay, the blocks in them do not. An
EfficientUNet is a ``UNet2DConditionModel`` with one more config key, ``block_repeats``, and is saved and loaded alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

# A pipeline folder names this module; diffusers looks in it for the base class that tells how to load the class named.
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401
from torch import Tensor, nn

from catimage_accel.extended_config import extends_config

__all__ = ["EfficientUNet", "left_out", "removable_blocks", "repeatable_blocks", "with_repeats"]

MOST_COPIES = 8
REPEATS_KEY = "block_repeats"


@extends_config
class EfficientUNet(UNet2DConditionModel):
    """``UNet2DConditionModel`` with ``block_repeats``: block path -> how many copies run there, one after the other.

    A path is a module's, such as ``"mid_block.resnets.1"`` or ``"up_blocks.2.attentions.0"``; those that are absent run
    once. 0 leaves a block out: what it is given goes on unchanged, in an up block without the skip connection. The
    second and later copies of an up block's ResNet see no skip connection, and a ResNet's later copies never divide
    their output by ``output_scale_factor``. ValueError for a path that is no block's, a count that is not 0 to 8, and a
    block that changes the number of channels and so can't be left out. Blocks are ``ResnetBlock2D`` and
    ``Transformer2DModel``; other kinds run once.
    """

    def __init__(self, block_repeats: Mapping[str, int] | None = None, **config: Any) -> None:
        super().__init__(**config)
        for path, copies in (block_repeats or {}).items():
            _check(self, path, copies)
        repeats = {path: copies for path, copies in (block_repeats or {}).items() if copies != 1}
        self.register_to_config(block_repeats=repeats)
        for path, copies in repeats.items():
            block = left_out(self, path) if copies == 0 else RepeatedBlock(self.get_submodule(path), copies)
            self.set_submodule(path, block, strict=True)


class SkippedResnet(nn.Module):
    """A ResNet block left out: gives the hidden states as they came, cut to ``channels``, before which a skip lies."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states[:, : self.channels]


class SkippedAttention(nn.Module):
    """A Transformer2DModel left out: gives the hidden states as they came, in a tuple or an object as it does."""

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        if not return_dict:
            return (hidden_states,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=hidden_states)


class RepeatedBlock(nn.Module):
    """Copies of a block, one after the other, in the place of one.

    Later copies of a ResNet have as many channels in as out; they see no skip connection.
    """

    def __init__(self, block: nn.Module, copies: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block, *(_another(block) for _ in range(copies - 1))])

    def forward(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        output: Any = hidden_states
        for block in self.blocks:
            output = block(output if isinstance(output, Tensor) else output[0], *inputs, **named)
        return output


def left_out(unet: UNet2DConditionModel, path: str) -> nn.Module:
    """What stands in the place of the block at ``path`` when it is left out; it has no weights."""
    block = unet.get_submodule(path)
    return SkippedResnet(_out_channels(block)) if ".resnets." in path else SkippedAttention()


def removable_blocks(unet: UNet2DConditionModel) -> list[str]:
    """The paths of the blocks that can be left out, in the order in which they run."""
    paths = repeatable_blocks(unet)
    return [path for path in paths if _hidden_channels(unet, path) == _out_channels(unet.get_submodule(path))]


def repeatable_blocks(unet: UNet2DConditionModel) -> list[str]:
    """The paths of the blocks that can run several times over, in the order in which they run.

    Stage by stage: ResNet i, then the attention behind it; in a mid block the first ResNet stands alone.
    """
    stages = [(f"down_blocks.{index}", stage) for index, stage in enumerate(unet.down_blocks)]
    if unet.mid_block is not None:
        stages.append(("mid_block", unet.mid_block))
    stages += [(f"up_blocks.{index}", stage) for index, stage in enumerate(unet.up_blocks)]
    found = []
    for name, stage in stages:
        resnets, attentions = list(stage.resnets), list(getattr(stage, "attentions", None) or [])
        offset = 1 if name == "mid_block" else 0
        for index, resnet in enumerate(resnets):
            if offset and index > 0 and index - 1 < len(attentions):
                found += [f"{name}.attentions.{index - 1}"] if _is_block(attentions[index - 1]) else []
            found += [f"{name}.resnets.{index}"] if _is_block(resnet) else []
            if not offset and index < len(attentions) and _is_block(attentions[index]):
                found.append(f"{name}.attentions.{index}")
    return found

def with_repeats(unet: UNet2DConditionModel, block_repeats: Mapping[str, int]) -> EfficientUNet:
    """A new network with ``unet``'s weights where its blocks survive; it predicts what ``unet`` does with those alone.

    ``block_repeats`` is added to what ``unet`` has already. Copies that ``unet`` does not have start as copies of the
    last that is there, as far as shapes agree, except that the last layer of their residual branch is zero: they change
    nothing at first. Where there are to be fewer copies than before, the first ones stay. Same dtype and device.
    ValueError as for :class:`EfficientUNet`, and for a block to be put back that ``unet`` has left out.
    """
    config = {key: value for key, value in unet.config.items() if not key.startswith("_") and key != REPEATS_KEY}
    before = dict(getattr(unet.config, REPEATS_KEY, None) or {})
    for path, copies in block_repeats.items():
        if before.get(path) == 0 and copies != 0:
            raise ValueError(f"block_repeats names {path!r}, which was left out before; its weights are lost")
    repeats = {**before, **block_repeats}
    made = EfficientUNet(block_repeats=repeats, **config)
    nn.Module.to(made, device=unet.device, dtype=unet.dtype)  # diffusers' own warns of every change of type
    weights = unet.state_dict()
    for path, copies in repeats.items():
        old, new = (f"{path}.blocks.0." if many > 1 else f"{path}." for many in (before.get(path, 1), copies))
        for name in [name for name in weights if old != new and name.startswith(old)]:
            weights[name.replace(old, new, 1)] = weights.pop(name)
    missing, unexpected = made.load_state_dict(weights, strict=False)
    lost = [name for name in unexpected if not any(name.startswith(f"{path}.") for path in repeats)]
    if lost:
        raise ValueError(f"weights have no place in the new network: {', '.join(lost[:3])}")
    fresh: dict[str, set[int]] = {}
    for name in missing:
        path, _, rest = name.partition(".blocks.")
        fresh.setdefault(path, set()).add(int(rest.split(".")[0]))
    for path, indices in fresh.items():
        _fill_copies(made.get_submodule(path), indices)
    return made.train(unet.training)


@torch.no_grad()
def _fill_copies(repeated: Any, new: set[int]) -> None:
    known = repeated.blocks[min(new) - 1].state_dict()
    for index in sorted(new):
        block = repeated.blocks[index]
        own = block.state_dict()
        fitting = {name: value for name, value in known.items() if name in own and own[name].shape == value.shape}
        block.load_state_dict(fitting, strict=False)
        last = block.conv2 if hasattr(block, "conv2") else block.proj_out
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)


def _is_block(module: nn.Module | None) -> bool:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return module is not None and isinstance(_first(module), ResnetBlock2D | Transformer2DModel)


def _first(block: nn.Module) -> Any:
    """The first copy of a block; that of an optional block too, which holds its own."""
    block = getattr(block, "block", block)
    return block.blocks[0] if isinstance(block, RepeatedBlock) else block


def _out_channels(block: nn.Module) -> int:
    found = _first(block)
    if isinstance(found, SkippedResnet):
        return found.channels
    return int(found.out_channels if found.out_channels is not None else found.in_channels)


def _hidden_channels(unet: UNet2DConditionModel, path: str) -> int:
    """Channels of the hidden states that reach the block at ``path``, a skip connection not counted."""
    block = unet.get_submodule(path)
    if ".attentions." in path:
        return _out_channels(block)
    stage_name, _, index = path.rpartition(".resnets.")
    if not stage_name.startswith("up_blocks."):
        return int(_first(block).in_channels)
    if int(index) > 0:
        return _out_channels(unet.get_submodule(f"{stage_name}.resnets.{int(index) - 1}"))
    number = int(stage_name.rpartition(".")[2])
    channels = list(reversed(unet.config.block_out_channels))
    return int(channels[max(0, number - 1)])


def _another(block: nn.Module) -> nn.Module:
    """A block like ``block``, with as many channels in as out, that can be an identity."""
    from diffusers.models.resnet import ResnetBlock2D

    if not isinstance(block, ResnetBlock2D):
        return copy.deepcopy(block)
    if block.in_channels == block.out_channels:
        made = copy.deepcopy(block)
        made.output_scale_factor = 1.0
        return made
    made = ResnetBlock2D(
        in_channels=block.out_channels, out_channels=block.out_channels,
        temb_channels=None if block.time_emb_proj is None else block.time_emb_proj.in_features,
        groups=block.norm2.num_groups, eps=block.norm2.eps, dropout=block.dropout.p,
        time_embedding_norm=block.time_embedding_norm, skip_time_act=block.skip_time_act,
    )  # fmt: skip
    made.nonlinearity = copy.deepcopy(block.nonlinearity)
    return made


def _check(unet: UNet2DConditionModel, path: str, copies: int) -> None:
    known = repeatable_blocks(unet)
    if path not in known:
        raise ValueError(f"block_repeats names {path!r}; accepted: {', '.join(known)}")
    if isinstance(copies, bool) or not isinstance(copies, int) or not 0 <= copies <= MOST_COPIES:
        raise ValueError(f"block_repeats has {copies!r} for {path}; accepted: a whole number from 0 to {MOST_COPIES}")
    if copies == 0 and path not in removable_blocks(unet):
        block = unet.get_submodule(path)
        raise ValueError(
            f"block_repeats leaves out {path}, which makes {_out_channels(block)} channels of "
            f"{_hidden_channels(unet, path)}; accepted: {', '.join(removable_blocks(unet))}"
        )
