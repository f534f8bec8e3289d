"""The model card's figures, measured on captions whose noun combinations were never trained on.

Pictures are drawn by diffusers' own StableDiffusionPipeline, with nothing of ours between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from rich.progress import track
from transformers import CLIPModel, CLIPTokenizer

from catimage_accel.zoo.render import render
from catimage_accel.zoo.scenes import SceneSpec
from catimage_accel.zoo.training.autoencoder import psnr, to_pixels
from catimage_accel.zoo.training.data import FIRST_MEASURED, held_out_captions, scene
from catimage_accel.zoo.training.judge import choice_accuracy

GUIDANCE_SCALE = 4.0
BATCH = 25


def measure_zoo(catalog: Path, number: int = 500) -> dict[str, Any]:
    """All figures of the catalog folder's models, over ``number`` held-out captions."""
    said = held_out_captions(number, FIRST_MEASURED)
    specs = [meaning for meaning, _ in said]
    scenes = np.stack([render(scene(FIRST_MEASURED + i, "test")) for i in range(number)])
    pipeline = StableDiffusionPipeline.from_pretrained(catalog / "model")
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(catalog / "judge").eval()
    tokenizer = CLIPTokenizer.from_pretrained(catalog / "judge")
    figures: dict[str, Any] = {
        "captions": number,
        "decoder_psnr_db": round(psnr(pipeline.vae, scenes), 2),
        "judge_accuracy_among_16": {
            "rendered scenes": _share(choice_accuracy(clip, tokenizer, scenes, specs)),
        },
        "judge_clip_score": {"rendered scenes": _by_objects(clip_scores(clip, tokenizer, scenes, said), specs)},
    }
    for steps in (50, 8, 4):
        pictures = draw(pipeline, [text for _, text in said], steps)
        name = f"teacher, DDIM, {steps} steps"
        figures["judge_accuracy_among_16"][name] = _share(choice_accuracy(clip, tokenizer, pictures, specs))
        figures["judge_clip_score"][name] = _by_objects(clip_scores(clip, tokenizer, pictures, said), specs)
    return figures


@torch.inference_mode()
def draw(pipeline: StableDiffusionPipeline, captions: list[str], steps: int) -> np.ndarray:
    """Pictures by the teacher with DDIM, seeds 0, 1, 2, ...: uint8 (n, 64, 64, 3)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    parts = []
    for start in track(range(0, len(captions), BATCH), f"drawing with {steps} steps"):
        batch = captions[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        drawn = pipeline(
            batch, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=generators, output_type="np"
        )
        parts.append((drawn.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


@torch.inference_mode()
def clip_scores(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: np.ndarray, said: list[tuple[SceneSpec, str]]
) -> np.ndarray:
    """max(cosine, 0) of each picture and its caption: float (n,)."""
    tokens = tokenizer([text for _, text in said], padding="max_length", truncation=True, return_tensors="pt")
    image = clip.visual_projection(clip.vision_model(to_pixels(pictures, clip.device).to(clip.dtype)).pooler_output)
    text = clip.text_projection(clip.text_model(tokens.input_ids).pooler_output)
    return torch.cosine_similarity(image, text).clamp(min=0).numpy()


def _share(right: np.ndarray) -> dict[str, float]:
    share = float(right.mean())
    return {"share": round(share, 3), "standard_error": round((share * (1 - share) / len(right)) ** 0.5, 3)}


def _by_objects(scores: np.ndarray, specs: list[SceneSpec]) -> dict[str, float]:
    counts = np.array([meaning.num_objects for meaning in specs])
    rows = {"all": float(scores.mean())}
    rows |= {f"{n} objects": float(scores[counts == n].mean()) for n in sorted(set(counts.tolist()))}
    return {name: round(value, 4) for name, value in rows.items()}
