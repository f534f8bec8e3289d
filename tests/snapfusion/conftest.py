"""A shrunken model of Stable Diffusion 1.5's shape, a folder of pictures with captions, and recipes for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

CAPTIONS = ("a dog", "two cats", "a crown on a pink background", "a bee left of a star", "three lemons")


@pytest.fixture(scope="session")
def sd15_shaped(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four stages, two layers a block, attention in the VAE; v-prediction; a few thousand random weights."""
    folder = tmp_path_factory.mktemp("sd15-shaped")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 24, 32, 32), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    pipe.register_modules(unet=unet, vae=vae)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures with captions, as Hugging Face's imagefolder has them."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        pixels = random.integers(0, 255, (70 + index, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def recipe(sd15_shaped: Path, pictures: Path, tiny_catalog: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of that name over the shrunken model and the pictures; ``None`` takes a key out."""
    shutil.copytree(sd15_shaped, tmp_path / "model")
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(tiny_catalog / "judge", tmp_path / "judge")
    training = {
        "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup": 1, "checkpoint_every": 2, "log_every": 1,
        "precision": "fp32",
    }  # fmt: skip

    def write(name: str, changes: dict[str, Any] | None = None, **fields: Any) -> Path:
        values = {"model": "model", "data": "pictures", "training": training | (changes or {}), **fields}
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write
