"""The models that the end-to-end benchmarks run: real shapes, random weights, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from catimage_accel.kernels.tuning.workload import TEXT_TOKENS


@dataclass(frozen=True)
class Family:
    """One architecture at the size that it draws at."""

    name: str
    latents: int  # on a side
    unet: dict[str, Any]
    decoder: dict[str, Any] = field(default_factory=dict)

    def new_unet(self, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
        """Weights as torch initialises them, the same every time."""
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(sample_size=self.latents, **self.unet)
        return unet.to(device, dtype).requires_grad_(False).eval()

    def new_vae(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """As ``new_unet``; in ``dtype``, like the decoders that were made fit for it."""
        torch.manual_seed(1)
        with torch.device(device):
            vae = AutoencoderKL(latent_channels=4, force_upcast=False, **self.decoder)
        return vae.to(device, dtype).requires_grad_(False).eval()

    def new_latents(self, images: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Noise."""
        shape = (images, 4, self.latents, self.latents)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)

    def new_conditions(self, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the UNet is told beside latents and timestep: stand-ins for a text encoder's results."""
        generator = torch.Generator().manual_seed(3)
        text = torch.randn(rows, TEXT_TOKENS, self.unet["cross_attention_dim"], generator=generator)
        found: dict[str, Any] = {"encoder_hidden_states": text.to(device, dtype)}
        if self.unet.get("addition_embed_type") == "text_time":
            sizes = 6 * self.unet["addition_time_embed_dim"]
            pooled = torch.randn(rows, self.unet["projection_class_embeddings_input_dim"] - sizes, generator=generator)
            side = 8.0 * self.latents
            found["added_cond_kwargs"] = {
                "text_embeds": pooled.to(device, dtype),
                "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * rows).to(device, dtype),
            }
        return found


SD15 = Family(
    "SD1.5 512x512", 64,
    {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
)  # fmt: skip
SDXL = Family(
    "SDXL 1024x1024", 128,
    {
        "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
)  # fmt: skip
TINY = Family(
    "tiny 32x32 latents", 32,
    {
        "block_out_channels": (32, 64, 96), "layers_per_block": 1, "cross_attention_dim": 128,
        "attention_head_dim": 4, "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    {
        "block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
)  # fmt: skip
FAMILIES = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}
