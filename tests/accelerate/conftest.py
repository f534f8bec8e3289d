"""Small random pipelines in the shapes of SD1.x and SDXL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from capturing import Compiler, Graph
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from catimage_accel.accelerate import cuda_graphs


@pytest.fixture
def sd(tiny_sd_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sdxl(sd: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """SDXL's shape: two text encoders, added conditions, linear projections, attention in the decoder."""
    torch.manual_seed(1)
    text_config = CLIPTextConfig.from_dict(sd.text_encoder.config.to_dict() | {"projection_dim": 32})
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=sd.scheduler, tokenizer=sd.tokenizer, tokenizer_2=sd.tokenizer,
        text_encoder=CLIPTextModel(text_config), text_encoder_2=CLIPTextModelWithProjection(text_config),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    torch.compiler.reset()
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    yield compiler
    torch.compiler.reset()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every capture's pool."""
    pools: list[Any] = []

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            self.pool: Any = None

        def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
            pools.append(self.pool)
            result = run()
            graph = Graph(run, result)
            self.pool = graph.pool()
            return graph, result

    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    return pools
