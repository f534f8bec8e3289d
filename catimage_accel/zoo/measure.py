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

from catimage_accel.quality import CLIPScore, caption_accuracy
from catimage_accel.zoo.captions import caption, near_misses
from catimage_accel.zoo.render import render
from catimage_accel.zoo.scenes import SceneSpec
from catimage_accel.zoo.training.autoencoder import psnr
from catimage_accel.zoo.training.data import FIRST_MEASURED, held_out_captions, scene

GUIDANCE_SCALE = 4.0
BATCH = 25


def measure_zoo(catalog: Path, number: int = 500) -> dict[str, Any]:
    """All figures of the catalog folder's models, over ``number`` held-out captions."""
    said = held_out_captions(number, FIRST_MEASURED)
    specs = [meaning for meaning, _ in said]
    scenes = np.stack([render(scene(FIRST_MEASURED + i, "test")) for i in range(number)])
    pipeline = StableDiffusionPipeline.from_pretrained(catalog / "model")
    pipeline.set_progress_bar_config(disable=True)
    judge = CLIPScore(catalog / "judge")
    captions = [text for _, text in said]
    misses = near_miss_captions(specs)
    figures: dict[str, Any] = {
        "captions": number,
        "decoder_psnr_db": round(psnr(pipeline.vae, scenes), 2),
        "judge_accuracy_among_16": {},
        "judge_clip_score": {},
    }

    def mark(name: str, pictures: np.ndarray) -> None:
        accuracy = caption_accuracy(judge, list(pictures), captions, misses)
        figures["judge_accuracy_among_16"][name] = _share(accuracy, number)
        figures["judge_clip_score"][name] = _by_objects(judge.score(list(pictures), captions), specs)

    mark("rendered scenes", scenes)
    for steps in (50, 8, 4):
        mark(f"teacher, DDIM, {steps} steps", draw(pipeline, captions, steps))
    return figures


def near_miss_captions(specs: list[SceneSpec], number: int = 15) -> list[list[str]]:
    """For each meaning ``number`` captions that say almost the same."""
    words = np.random.default_rng(0)
    return [[caption(miss, words) for miss in near_misses(spec, number, words)] for spec in specs]


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


def _share(share: float, number: int) -> dict[str, float]:
    return {"share": round(share, 3), "standard_error": round((share * (1 - share) / number) ** 0.5, 3)}


def _by_objects(scores: np.ndarray, specs: list[SceneSpec]) -> dict[str, float]:
    counts = np.array([meaning.num_objects for meaning in specs])
    rows = {"all": float(scores.mean())}
    rows |= {f"{n} objects": float(scores[counts == n].mean()) for n in sorted(set(counts.tolist()))}
    return {name: round(value, 4) for name, value in rows.items()}
