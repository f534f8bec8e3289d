"""Shared real parts: small, randomly initialised pipelines in diffusers' folder format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.routing import KNNRouter
from catimage_accel.zoo.training.tokenizer import build_tokenizer

torch.set_num_threads(1)


def tiny_stable_diffusion(prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """A random Stable Diffusion pipeline, 16x16x4 latents, 64x64 pixels, weights fixed by a seed."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(captions=300)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, norm_num_groups=4, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=prediction_type, timestep_spacing="trailing",
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_stable_diffusion`` saved as a diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """A random pipeline of SDXL's layout: encoders of unlike widths, added conditions, linear projections."""
    sd = tiny_stable_diffusion("epsilon")
    torch.manual_seed(2)
    first = sd.text_encoder.config.to_dict()
    second = CLIPTextConfig.from_dict(
        first | {"hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 20, "architectures": None}
    )
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=68,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=sd.vae, unet=unet, scheduler=sd.scheduler, tokenizer=sd.tokenizer, tokenizer_2=sd.tokenizer,
        text_encoder=sd.text_encoder, text_encoder_2=CLIPTextModelWithProjection(second), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_sdxl`` saved as a diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    tiny_sdxl().save_pretrained(folder)
    return folder


TINY_CANDIDATES = {"cheap-2": ("ddim", 2, 1.0, {}), "middle-3": ("dpmsolver++", 3, 3.0, {"deepcache_interval": 2}),
                   "dear-4": ("euler", 4, 3.0, {})}  # fmt: skip
TINY_GFLOP = {"cheap-2": 1, "middle-3": 3, "dear-4": 8}


@pytest.fixture(scope="session")
def tiny_catalog(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole catalog: three candidates of ``tiny_sd_folder``, a random judge, scores, a fitted router, checksums.

    The scores say that "cheap-2" draws single objects as well as any, and crowds need "dear-4". Copy it to change it.
    """
    folder = tmp_path_factory.mktemp("tiny-catalog")
    shutil.copytree(tiny_sd_folder, folder / "model")
    save_tiny_judge(folder / "judge")
    candidates = tuple(
        Candidate(name, "model", steps, sampler, guidance_scale, options=options)
        for name, (sampler, steps, guidance_scale, options) in TINY_CANDIDATES.items()
    )
    flops = {name: gflop * 10**9 for name, gflop in TINY_GFLOP.items()}
    catalog = Catalog(folder, "tiny", candidates, judge="judge", tradeoff=0.05, flops=flops).save(folder)
    nouns = ("dog", "cat", "crown", "lemon", "castle", "rocket", "bee", "star")
    prompts = [f"a {noun}" for noun in nouns] + [
        f"a {one}, a {two} and three {three}s" for one, two, three in zip(nouns, nouns[1:], nouns[2:], strict=False)
    ]
    rows = [
        {"prompt": prompt, "candidate": name, "seed": 0, "metric": "clip_score",
         "score": 0.3 - 0.02 * prompt.count(",") * (8 - TINY_GFLOP[name])}
        for prompt in prompts for name in TINY_CANDIDATES
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "quality.parquet")
    KNNRouter(k=3, shrinkage=0.0).fit(catalog.quality_table()).save(folder / "router")
    catalog.write_checksums()
    return folder


@pytest.fixture
def cpu_norms(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What accelerated models give the CPU's C++ group_norm, outside of Triton's interpreter."""
    from catimage_accel.accelerate import modules, norms
    from catimage_accel.kernels import cpu
    from catimage_accel.kernels.build import CPU

    if not cpu.BUILT:
        pytest.skip(f"not built: {CPU.how_to_build}")
    monkeypatch.setattr(modules, "TRITON_INTERPRETS", False)
    given: list[torch.Tensor] = []
    plain = norms.cpu_group_norm

    def seen(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        given.append(x)
        return plain(x, *arguments, **options)

    monkeypatch.setattr(norms, "cpu_group_norm", seen)
    return given


def save_tiny_judge(folder: Path) -> None:
    """A random CLIP model with tokenizer and image processor, weights fixed by a seed."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(captions=300)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
