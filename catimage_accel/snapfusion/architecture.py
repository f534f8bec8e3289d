"""SnapFusion's final network at Stable Diffusion 1.5's scale (arXiv 2306.00980), as a plain diffusers UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""What tells Stable Diffusion 1.5's UNet from diffusers' defaults."""

MID_RESNETS = (7, 4)
_DEPTHS: dict[str, Any] = {
    "layers_per_block": {7: (2, 2, 1, 2), 4: (2, 2, 1, 1)},
    "transformer_layers_per_block": ((1, 1), (1, 1), (2,), (1, 1)),
    "reverse_transformer_layers_per_block": ((1, 1, 1), (3, 3), (1, 1, 1), (1, 1, 1)),
}
# What else Stable Diffusion 1.5's shape is: diffusers' defaults, and no block left out or repeated.
_ALSO: dict[str, Any] = {
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "block_repeats": {},
}  # fmt: skip
# A module here -> where its weights come from in Stable Diffusion 1.5, if not from the module of its own name.
_MOVED = {"up_blocks.1.resnets.1.": "up_blocks.1.resnets.2.", "up_blocks.1.attentions.1.": "up_blocks.1.attentions.2."}
_MOVED_FOR_4 = {
    "up_blocks.0.resnets.1.": "up_blocks.0.resnets.2.",
    "down_blocks.3.attentions.0.": "mid_block.attentions.0.",
}
# The last layers of a transformer block's three branches: zero, they let what comes in through.
_BRANCH_ENDS = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.net.2.")


def snapfusion_unet(base: UNet2DConditionModel | None = None, *, mid_resnets: int = 7) -> UNet2DConditionModel:
    """SnapFusion's UNet, which ``UNet2DConditionModel.from_pretrained`` loads once it is saved.

    Cross-attention blocks by stage, Stable Diffusion 1.5's 2, 2, 2, 1, 3, 3, 3, are 0, 2, 2, 1, 6, 3, 0; ResNet blocks,
    2, 2, 2, 7, 3, 3, 3, are 2, 2, 1, ``mid_resnets``, 2, 3, 3. Two attention blocks behind one ResNet are two layers of
    one Transformer2DModel. The published table and the published number of parameters, 848 M, do not agree: with the 4
    middle ResNets of the table (1 on the way down, with the attention, 1 in the middle, 2 on the way up) it has 743 M,
    746 M with the attention on the way up instead, 12% less than published. Reading the middle's 4 as all 7 that were
    there, the default, gives 854 M, 0.8% more than published; no other count put back to what it was is within 1%.

    ``base``, a UNet of Stable Diffusion 1.5's shape and of any width, gives the weights of all blocks that survive;
    those that are new change nothing at first. Without it the weights are random, at the full width. ValueError for a
    base of another shape.
    """
    if mid_resnets not in MID_RESNETS:
        raise ValueError(f"mid_resnets is {mid_resnets!r}; accepted: 7 or 4")
    if base is not None:
        _check_shape(base.config)
    config = dict(SD15) if base is None else {k: v for k, v in base.config.items() if not k.startswith("_")}
    layers = _DEPTHS["layers_per_block"]
    config |= {name: depths for name, depths in _DEPTHS.items() if name != "layers_per_block"}
    config |= {
        "layers_per_block": layers[mid_resnets],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    if mid_resnets == 4:
        config["mid_block_type"] = "UNetMidBlock2D"
        config["down_block_types"] = (*config["down_block_types"][:3], "CrossAttnDownBlock2D")
    made = UNet2DConditionModel.from_config(config)
    if base is None:
        return made
    nn.Module.to(made, device=base.device, dtype=base.dtype)  # diffusers' own warns of every change of type
    _inherit(made, base.state_dict(), _MOVED | (_MOVED_FOR_4 if mid_resnets == 4 else {}))
    return made.train(base.training)


def _check_shape(config: Mapping[str, Any]) -> None:
    for name in ("down_block_types", "up_block_types", "layers_per_block"):
        found = tuple(config[name]) if isinstance(config[name], list) else config[name]
        if found != SD15[name]:
            raise ValueError(f"base has {name} {found}; accepted: Stable Diffusion 1.5's, {SD15[name]}")
    for name, accepted in _ALSO.items():
        if (found := config.get(name, accepted)) != accepted:
            raise ValueError(f"base has {name} {found!r}; accepted: {accepted!r}")


@torch.no_grad()
def _inherit(made: nn.Module, weights: Mapping[str, Tensor], moved: Mapping[str, str]) -> None:
    for name, value in made.state_dict().items():
        source = next((name.replace(new, old, 1) for new, old in moved.items() if name.startswith(new)), name)
        if source in weights and weights[source].shape == value.shape:
            value.copy_(weights[source])
        elif any(end in name for end in _BRANCH_ENDS):
            value.zero_()
