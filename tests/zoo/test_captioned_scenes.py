"""The training scenes as latents with captions."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from catimage_accel.zoo.training.captioned import CaptionedScenes
from catimage_accel.zoo.training.denoiser import teacher_weight


def test_encoding_leaves_the_vae_as_it_was_and_is_done_once(tiny_sd_folder: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae")
    first = CaptionedScenes(tmp_path, vae, teacher_weight, scenes=6)
    assert vae.dtype == torch.float32
    (kept,) = tmp_path.glob("latents-6-*.safetensors")
    made = kept.stat().st_mtime_ns
    again = CaptionedScenes(tmp_path, vae, teacher_weight, scenes=6)
    assert kept.stat().st_mtime_ns == made
    assert torch.equal(first.latents, again.latents)
    latents, captions = first.batch(4, torch.Generator().manual_seed(0))
    assert latents.shape == (4, 4, 16, 16)
    assert (again.batch(4, torch.Generator().manual_seed(0))[1]) == captions
