"""The zoo's AutoencoderKL: 64x64 pixels to 16x16 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.zoo.training.data import rendered

LATENT_CHANNELS = 8
KL_WEIGHT = 1e-4
DEFAULTS = TrainConfig(steps=3600, batch_size=16, learning_rate=2e-3, ema_decay=0.995)


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_pixels(pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) to bf16 (n, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2)
    return (pixels.to(torch.bfloat16) / 127.5 - 1).contiguous()


def train_autoencoder(folder: Path, config: TrainConfig, device: torch.device, scenes: int = 30_000) -> AutoencoderKL:
    """Train, or go on training, in ``folder``; returns the averaged model in float32, its latents of unit variance."""
    torch.manual_seed(config.seed)
    pictures = rendered(scenes, "train", folder.parent)
    model = new_autoencoder()
    trainer = Trainer(model, config, folder, device, "autoencoder")

    def loss_fn(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(scenes, (config.batch_size,), generator=generator).numpy()
        pixels = to_pixels(pictures[index], device)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        restored = model.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        target = pixels.float()
        return F.l1_loss(restored, target) + 2 * F.mse_loss(restored, target) + KL_WEIGHT * kl

    trainer.run(loss_fn)
    model = model.float()
    model.load_state_dict(trainer.ema_state())
    latents = encode(model, pictures[:2000])
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    return model


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: np.ndarray, batch_size: int = 128) -> torch.Tensor:
    """Latent means, unscaled: float32 (n, channels, 16, 16)."""
    device, dtype = model.device, model.dtype
    parts = []
    for start in range(0, len(pictures), batch_size):
        pixels = to_pixels(pictures[start : start + batch_size], device).to(dtype)
        parts.append(model.encode(pixels).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: np.ndarray, batch_size: int = 128) -> float:
    """Mean over pictures of the reconstruction's PSNR in dB, peak 255, from latent means."""
    values = []
    for start in range(0, len(pictures), batch_size):
        pixels = to_pixels(pictures[start : start + batch_size], model.device).to(model.dtype)
        restored = model.decode(model.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
        error = ((restored - pixels.float()) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * error.log10())
    return float(torch.cat(values).mean())
