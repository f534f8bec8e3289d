"""What the lossy tiers of ``accelerate`` cost in quality and save in time, in diffusers' own pipeline.

    python bench/bench_tiers.py [--number 500] [--steps 25 50] [--seconds 60] [--threads 1]

Held-out captions are drawn by the built-in catalog's teacher (DDIM), each from the same noise in every tier. Told are
CLIPScore by the judge, its change from "lossless" with a 95% bootstrap interval over captions, and how far apart the
judge's embeddings of the two tiers' pictures lie (1 - cosine, on average), beside the same for two pictures of one
caption. Times are of a batch of pictures, decode included, the tiers in turns in the process's CPU time. For SD1.5 and
SDXL the share of a whole UNet call's multiply-adds that is left between refreshes is counted, nothing is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from checkout import map_package

map_package()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_cpu import CPU, load  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from families import SD15, SDXL, Family  # noqa: E402
from interleaved import interleave  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402
from splits import interval  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from catimage_accel.accelerate import accelerate  # noqa: E402
from catimage_accel.accelerate.deep_blocks import swap_deep_blocks  # noqa: E402
from catimage_accel.accelerate.deep_cache import INTERVALS  # noqa: E402
from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.quality import CLIPScore  # noqa: E402
from catimage_accel.zoo.training.data import held_out_captions  # noqa: E402

CAPTIONS = 30_000
"""The first of those that it draws."""
BATCH = 10
RESAMPLES = 2000


def draw(pipe: StableDiffusionPipeline, captions: Sequence[str], steps: int, scale: float, seed: int) -> np.ndarray:
    """(captions, height, width, 3), from 0 to 1; the noise of a caption is that of its place."""
    generators = [torch.Generator().manual_seed(seed * 1_000_000 + index) for index in range(len(captions))]
    parts = [
        pipe(
            list(captions[begin : begin + BATCH]), num_inference_steps=steps, guidance_scale=scale,
            generator=generators[begin : begin + BATCH], output_type="np",
        ).images
        for begin in range(0, len(captions), BATCH)
    ]  # fmt: skip
    return np.concatenate(parts)


def embed(judge: CLIPScore, pictures: np.ndarray) -> np.ndarray:
    return judge.embed_images(list((255 * pictures).round().astype(np.uint8)))


def measure(
    pipe: StableDiffusionPipeline, judge: CLIPScore, captions: list[str], steps: int, scale: float, seconds: float
) -> list[dict[str, Any]]:
    """A row a tier."""
    texts = judge.embed_texts(captions)

    def drawn(tier: Any, wanted: list[str], seed: int = 0) -> np.ndarray:
        return draw(accelerate(pipe, tier=tier), wanted, steps, scale, seed)

    images = {tier: embed(judge, drawn(tier, captions)) for tier in INTERVALS}
    few = captions[: max(1, len(captions) // 5)]
    other_noise = embed(judge, drawn("lossless", few, seed=1))
    times = interleave({tier: partial(drawn, tier, captions[:BATCH]) for tier in INTERVALS}, CPU, seconds=seconds)
    scores = {tier: np.clip((found * texts).sum(axis=1), 0, 1) for tier, found in images.items()}
    rng = np.random.default_rng(0)
    picks = np.concatenate(
        [np.arange(len(captions))[None], rng.integers(len(captions), size=(RESAMPLES, len(captions)))]
    )
    plain = images["lossless"]
    return [
        {
            "model": "built-in teacher", "steps": steps, "tier": tier, "captions": len(captions),
            "clip_score": float(scores[tier].mean()),
            "change": interval((scores[tier] - scores["lossless"])[picks].mean(axis=1)),
            "distance": float((1 - (images[tier] * plain).sum(axis=1)).mean()),
            "distance of another noise": float((1 - (other_noise * plain[: len(few)]).sum(axis=1)).mean()),
            "picture": times[tier].figures(),
            "times as fast": times[tier].times_as_fast_as(times["lossless"]),
        }
        for tier in INTERVALS
    ]  # fmt: skip


def share_between_refreshes(family: Family) -> float:
    """Of a whole call's floating-point operations, counted on shapes alone."""
    shapes = torch.device("meta"), torch.float32
    unet = family.new_unet(*shapes)
    sample, conditions = family.new_latents(2, *shapes), family.new_conditions(2, *shapes)
    call = partial(unet, sample, torch.tensor(500, device="meta"), **conditions)
    features = swap_deep_blocks(unet)
    counted = []
    for skips in (False, True):
        features.skips = skips
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    return counted[1] / counted[0]


def main() -> None:
    """Measures, saves, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=500, help="captions")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50])
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times, at each number of steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = about(CPU, torch.float32)
    path = result_file("tiers", CPU, facts["date"])
    catalog = Catalog.load("emoji")
    judge = CLIPScore(catalog.judge_folder)
    captions = [text for _, text in held_out_captions(args.number, CAPTIONS)]
    pipe, scale = load(catalog, "teacher-ddim-25"), catalog.candidate("teacher-ddim-25").guidance_scale
    rows: list[dict[str, Any]] = [
        {"model": family.name, "share between refreshes": share_between_refreshes(family)} for family in (SD15, SDXL)
    ]
    save(path, facts, rows)
    for steps in args.steps:
        rows += measure(pipe, judge, captions, steps, scale, args.seconds)
        save(path, facts, rows)
    print_table(
        f"tiers of accelerate() on {facts['device']}, {args.threads} threads; {path}",
        ["steps", "tier", "CLIPScore", "change", "distance", "(other noise)", "ms", "times as fast"],
        [
            [
                str(row["steps"]), row["tier"], f"{row['clip_score']:.4f}",
                "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["change"]), f"{row['distance']:.4f}",
                f"{row['distance of another noise']:.3f}", f"{row['picture']['ms'] / BATCH:.0f}",
                f"{row['times as fast']:.2f}",
            ]
            for row in rows if "tier" in row
        ],
    )  # fmt: skip
    for row in rows[:2]:
        print(f"{row['model']}: {row['share between refreshes']:.3f} of a call's operations between refreshes")


if __name__ == "__main__":
    main()
