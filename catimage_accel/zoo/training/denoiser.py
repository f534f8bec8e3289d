"""The zoo's denoisers: the teacher UNet, trained together with the text encoder, and a smaller UNet.

Both predict v (Salimans and Ho, arXiv 2202.00512) on latents of the zoo's autoencoder; one caption in ten
is dropped, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from catimage_accel.snapfusion.losses import stratified_timesteps
from catimage_accel.training.config import TRAINING_ATTENTION, TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.scenes import SceneSpec
from catimage_accel.zoo.training.captioned import CaptionedScenes
from catimage_accel.zoo.training.data import hard_scenes_weight
from catimage_accel.zoo.training.places import PlaceLoss

TEXT_WIDTH = 192
CAPTION_DROPOUT = 0.1
RELATION_WEIGHT, COUNT_WEIGHT = 1.5, 2.0
FEW_OBJECTS_WEIGHTS = {1: 6.0, 2: 2.0, 3: 1.0, 4: 1.0}
PLACE_LOSS_WEIGHT = 0.2
TEACHER = TrainConfig(steps=11700, batch_size=64, learning_rate=1.2e-3, warmup=150, ema_decay=0.998)
SMALL = TrainConfig(steps=5000, batch_size=64, learning_rate=2e-3, warmup=150, ema_decay=0.998)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(block_out_channels: tuple[int, int, int], latent_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, in spite of its name
        norm_num_groups=16,
    )


def new_teacher(latent_channels: int) -> UNet2DConditionModel:
    return new_unet((80, 160, 160), latent_channels)


def new_small(latent_channels: int) -> UNet2DConditionModel:
    return new_unet((32, 64, 96), latent_channels)


def new_scheduler() -> DDIMScheduler:
    """Trailing timesteps start from the noisiest, so that few steps see the noise they were trained on."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class TextToLatent(nn.Module):
    """Text encoder and UNet as one module, so that one optimizer trains both.

    ``place_head``, thrown away afterwards, reads from a noun's token where its object is: without it the
    noise alone hardly ever teaches the encoder to tell "left of" from "right of".
    """

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.place_head = nn.Linear(TEXT_WIDTH, 2)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted v, and a place (batch, tokens, 2) for each token."""
        states = self.text_encoder(input_ids).last_hidden_state
        return self.unet(sample, timestep, states).sample, self.place_head(states)


def teacher_weight(spec: SceneSpec) -> float:
    """How often the teacher sees a scene, against others."""
    return hard_scenes_weight(spec, RELATION_WEIGHT, COUNT_WEIGHT)


def small_weight(spec: SceneSpec) -> float:
    """How often the small UNet, which has room for little, sees a scene, against others: one object first, then two."""
    return FEW_OBJECTS_WEIGHTS[spec.num_objects]


def train_denoiser(
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    weight: Callable[[SceneSpec], float],
    scenes: int = 96_000,
    train_text: bool = True,
) -> None:
    """Train ``unet``, and ``text_encoder`` unless ``train_text`` is off, in place, from or to ``folder``'s checkpoint.

    ``weight`` tells how often a scene is taken, against others.
    On return both hold the averaged weights in float32.
    """
    source = CaptionedScenes(folder.parent, vae, weight, scenes)
    place_loss = PlaceLoss(source.layouts, tokenizer) if train_text else None
    alphas = new_scheduler().alphas_cumprod
    model = TextToLatent(text_encoder, unet)
    text_encoder.set_attn_implementation(TRAINING_ATTENTION)
    unet.set_attn_processor(AttnProcessor())
    text_encoder.requires_grad_(train_text)
    model.place_head.requires_grad_(train_text)
    trainer = Trainer(model, config, folder, device, folder.name)

    def loss_fn(step: int, generator: torch.Generator) -> torch.Tensor:
        index = source.choose(config.batch_size, generator)
        words = np.random.default_rng((config.seed, step))
        said = [source.specs[i] for i in index.tolist()]
        captions = ["" if words.random() < CAPTION_DROPOUT else caption(meaning, words) for meaning in said]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = source.latents[index].float()
        noise = torch.randn(clean.shape, generator=generator)
        timestep = stratified_timesteps(config.batch_size, len(alphas), generator)
        alpha = alphas[timestep].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas[timestep]).sqrt().view(-1, 1, 1, 1)
        noisy = (alpha * clean + sigma * noise).to(device, torch.bfloat16)
        target = (alpha * noise - sigma * clean).to(device)
        predicted, guess = model(noisy, timestep.to(device), ids.to(device))
        loss = F.mse_loss(predicted.float(), target)
        return loss + PLACE_LOSS_WEIGHT * place_loss(guess, ids, index) if place_loss else loss

    trainer.run(loss_fn)
    model.float()
    model.load_state_dict(trainer.ema_state(), strict=False)
