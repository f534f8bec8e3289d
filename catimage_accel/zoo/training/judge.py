"""The zoo's judge: a CLIP trained on its own, on rendered scenes, never used to condition a picture.

Besides the usual contrastive loss over the batch (Radford et al., arXiv 2103.00020) it learns to tell
each caption from near misses of it, its image patches learn to name the object they show, and the pooled
image to say where each noun is: without that, "left" and "right" stay one word to it. The heads for these
two are thrown away. Nouns and backgrounds are learned in minutes, places and numbers are not, so the
latter have the larger share of the near misses and of the pictures; half of the pictures are mirrored,
with "left" and "right" exchanged in their captions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from catimage_accel.training.config import TRAINING_ATTENTION, TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.zoo.captions import caption, near_misses
from catimage_accel.zoo.objects import NOUNS
from catimage_accel.zoo.scenes import IMAGE_SIZE, Scene, mirrored_spec
from catimage_accel.zoo.training.autoencoder import to_pixels
from catimage_accel.zoo.training.data import hard_scenes_weight, rendered, scene
from catimage_accel.zoo.training.places import noun_places

PATCH = 8
WIDTH = 192
NEAR_MISSES = 4
MISS_ODDS = (0.2, 0.35, 0.35, 0.1)  # noun, count, relation, background
RELATION_WEIGHT, COUNT_WEIGHT = 3.0, 2.0
PATCH_LOSS_WEIGHT = 0.5
PLACE_LOSS_WEIGHT = 2.0
DEFAULTS = TrainConfig(steps=6400, batch_size=96, learning_rate=1.5e-3, warmup=150, weight_decay=0.05, ema_decay=0.995)


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = shared | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"image_size": IMAGE_SIZE, "patch_size": PATCH, "num_hidden_layers": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


class _JudgeWithHeads(nn.Module):
    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.patch_head = nn.Linear(WIDTH, len(NOUNS) + 1)
        self.place_head = nn.Linear(WIDTH, len(NOUNS) * 2)


def patch_labels(picture: Scene) -> np.ndarray:
    """(8, 8): for each patch the index of the noun whose object covers its middle, or len(NOUNS)."""
    side = IMAGE_SIZE // PATCH
    middles = (np.arange(side) + 0.5) * PATCH
    labels = np.full((side, side), len(NOUNS))
    for placed in picture.objects:
        inside = np.hypot(middles[None, :] - placed.x, middles[:, None] - placed.y) < 0.45 * placed.size
        labels[inside] = NOUNS.index(placed.noun)
    return labels


def train_judge(
    folder: Path, config: TrainConfig, device: torch.device, tokenizer: CLIPTokenizer, scenes: int = 96_000
) -> CLIPModel:
    """Train, or go on training, in ``folder``; returns the averaged model in float32."""
    torch.manual_seed(config.seed + 77)
    pictures = rendered(scenes, "train", folder.parent)
    layouts = [scene(index, "train") for index in range(scenes)]
    labels = torch.from_numpy(np.stack([patch_labels(layout) for layout in layouts]))
    places = torch.from_numpy(np.stack([noun_places(layout) for layout in layouts]))
    weights = torch.tensor([hard_scenes_weight(layout.spec, RELATION_WEIGHT, COUNT_WEIGHT) for layout in layouts])
    model = _JudgeWithHeads(new_judge(tokenizer))
    model.clip.set_attn_implementation(TRAINING_ATTENTION)
    trainer = Trainer(model, config, folder, device, "judge")

    def loss_fn(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.multinomial(weights, config.batch_size, generator=generator)
        mirrored = torch.rand(config.batch_size, generator=generator) < 0.5
        words = np.random.default_rng((config.seed + 77, step))
        specs = [layouts[i].spec for i in index.tolist()]
        specs = [mirrored_spec(said) if flip else said for said, flip in zip(specs, mirrored.tolist(), strict=True)]
        groups = [[said, *near_misses(said, NEAR_MISSES, words, MISS_ODDS)] for said in specs]
        captions = [caption(said, words) for group in groups for said in group]
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        pixels = to_pixels(pictures[index.numpy()], device)
        pixels = torch.where(mirrored.to(device).view(-1, 1, 1, 1), pixels.flip(3), pixels)
        vision = model.clip.vision_model(pixels)
        image = F.normalize(model.clip.visual_projection(vision.pooler_output).float(), dim=-1)
        encoded = model.clip.text_model(tokens.input_ids).pooler_output
        text = F.normalize(model.clip.text_projection(encoded).float(), dim=-1)
        text = text.view(len(groups), NEAR_MISSES + 1, -1)
        scale = model.clip.logit_scale.float().exp().clamp(max=100)
        # an image against every true caption of the batch and its own near misses
        against_batch = scale * image @ text[:, 0].T
        against_misses = scale * torch.einsum("bd,bmd->bm", image, text[:, 1:])
        target = torch.arange(len(groups), device=device)
        contrast = F.cross_entropy(torch.cat([against_batch, against_misses], 1), target)
        contrast = (contrast + F.cross_entropy(against_batch.T, target)) / 2
        patches = model.patch_head(vision.last_hidden_state[:, 1:]).float()
        shown = torch.where(mirrored.view(-1, 1, 1), labels[index].flip(2), labels[index])
        named = F.cross_entropy(patches.flatten(0, 1), shown.to(device).flatten())
        where = places[index].clone()
        where[mirrored, :, 0] *= -1
        where = where.to(device)
        present = ~where.isnan()
        guess = model.place_head(vision.pooler_output).float().view_as(where)
        placed = F.smooth_l1_loss(guess[present], where[present], beta=0.1)
        return contrast + PATCH_LOSS_WEIGHT * named + PLACE_LOSS_WEIGHT * placed

    trainer.run(loss_fn)
    model.float()
    model.load_state_dict(trainer.ema_state())
    return model.clip
