"""A tiny random UNet, and one call's arguments."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

SAMPLE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))


def tiny_unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8,
        } | config
    ).eval()  # fmt: skip
