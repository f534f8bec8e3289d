"""Images a second: the executor against a loop over diffusers' pipeline, same routed prompts, same process.

    python bench/bench_executor.py [--prompts FILE] [--catalog emoji] [--json FILE]

All draw the same prompts with the same candidates and seeds, in float32, to uint8 images: the loop, the executor with
PyTorch ("executor"), and the executor with the engines that the catalog measured fastest ("engines"). The loop is what
a diffusers user writes: one StableDiffusionPipeline a UNet, the candidate's scheduler set before each call, prompts of
one candidate in turn so that none is rebuilt needlessly, no progress bar. DeepCache candidates are left out of the
routing, for the loop has none. Rounds alternate; a ratio is that of the medians. With ``--untrained`` no catalog is
needed: random weights of the zoo's shapes and candidates in turn, as speed does not depend on either.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.engines.loading import load_unet, load_vae
from catimage_accel.executor import Executor, Job
from catimage_accel.profiling import catalog_executor
from catimage_accel.storage import write_atomic

ROUTING_ROUNDS = 9
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
NOUNS = ("dog", "crown", "bear", "lemon", "rocket", "guitar", "tree", "ball")


def default_prompts(count: int) -> list[str]:
    """One to four objects in turn."""
    shapes = ("a {0}", "a {0} and a {1}", "a {0}, a {1} and a {2} on a pink background", "a {0} left of a {1}")
    return [shapes[i % 4].format(*np.roll(NOUNS, i)[:3]) for i in range(count)]


def routed(catalog: Catalog, prompts: list[str], tradeoff: float) -> tuple[list[Candidate], list[float]]:
    """Every prompt's candidate, and the seconds of each of several routings of them all, the first one cold."""
    from catimage_accel.routing import choose

    router = catalog.router()
    usable = [c for c in catalog.candidates if not c.options and c.precision == "fp32"]
    names = list(router.candidates)
    columns = [names.index(c.name) for c in usable]
    costs = np.array([catalog.costs[c.name] for c in usable])
    seconds = []
    for _ in range(ROUTING_ROUNDS):
        start = time.perf_counter()
        chosen = choose(router.predict(prompts)[:, columns], costs, tradeoff)
        seconds.append(time.perf_counter() - start)
    return [usable[i] for i in chosen], seconds


def untrained(folder: Path) -> list[Candidate]:
    """The zoo's shapes with random weights, and candidates that use them."""
    from transformers import CLIPTextModel

    from catimage_accel.zoo.training.autoencoder import new_autoencoder
    from catimage_accel.zoo.training.denoiser import new_scheduler, new_small, new_teacher, new_text_encoder
    from catimage_accel.zoo.training.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer, vae = build_tokenizer(captions=300), new_autoencoder()
    text_encoder: CLIPTextModel = new_text_encoder(tokenizer)
    channels = vae.config.latent_channels
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=new_teacher(channels), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    new_small(channels).save_pretrained(folder / "unet_small")
    mix = [("ddim", 25, "unet"), ("dpmsolver++", 10, "unet"), ("ddim", 25, "unet_small"), ("dpmsolver++", 6, "unet"),
           ("ddim", 8, "unet_small")]  # fmt: skip
    return [
        Candidate(f"{unet}-{sampler}-{steps}", str(folder), steps, sampler, 4.0, unet) for sampler, steps, unet in mix
    ]


class DiffusersLoop:
    """One pipeline a (model, UNet, VAE); the parts that UNets of one model have in common are shared."""

    def __init__(self, candidates: list[Candidate], resolve: Callable[[str], Path]) -> None:
        self._pipes: dict[tuple[str, str, str], StableDiffusionPipeline] = {}
        for c in candidates:
            if (c.model, c.unet, c.vae) not in self._pipes:
                folder = resolve(c.model)
                unet = load_unet(folder, c.unet, torch.float32)
                vae = load_vae(folder, torch.float32, c.vae)
                pipe = StableDiffusionPipeline.from_pretrained(folder, unet=unet, vae=vae, safety_checker=None)
                pipe.set_progress_bar_config(disable=True)
                self._pipes[c.model, c.unet, c.vae] = pipe

    def draw(self, prompts: list[str], candidates: list[Candidate]) -> list[np.ndarray]:
        images: dict[int, np.ndarray] = {}
        for index in sorted(range(len(prompts)), key=lambda i: candidates[i].name):
            c = candidates[index]
            pipe = self._pipes[c.model, c.unet, c.vae]
            pipe.scheduler = SCHEDULERS[c.sampler].from_config(pipe.scheduler.config)
            image = pipe(
                prompts[index], num_inference_steps=c.steps, guidance_scale=c.guidance_scale,
                guidance_rescale=c.guidance_rescale, generator=torch.Generator().manual_seed(index),
            ).images[0]  # fmt: skip
            images[index] = np.asarray(image)
        return [images[index] for index in range(len(prompts))]


def draw_with_executor(executor: Executor, prompts: list[str], candidates: list[Candidate]) -> list[np.ndarray]:
    jobs = (
        Job(prompt, c, torch.Generator().manual_seed(index), key=index)
        for index, (prompt, c) in enumerate(zip(prompts, candidates, strict=True))
    )
    images: dict[int, np.ndarray] = {}
    for outcome in executor.run(jobs):
        if outcome.error is not None:
            raise outcome.error
        images[outcome.key] = outcome.image
    return [images[index] for index in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji", help="folder, hub id or built-in name")
    parser.add_argument("--untrained", action="store_true", help="random weights instead of a catalog")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; default: 32 built-in ones")
    parser.add_argument("--count", type=int, default=32, help="how many prompts")
    parser.add_argument("--tradeoff", type=float, default=0.05)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else default_prompts(args.count)
    prompts = [prompt for prompt in prompts if prompt.strip()][: args.count]

    with tempfile.TemporaryDirectory() as scratch:
        if args.untrained:
            mix, routing_seconds, resolve = untrained(Path(scratch)), [0.0], Path
            candidates = [mix[index % len(mix)] for index in range(len(prompts))]
        else:
            catalog = Catalog.load(args.catalog)
            resolve = catalog.resolve_model
            candidates, routing_seconds = routed(catalog, prompts, args.tradeoff)
        loop = DiffusersLoop(candidates, resolve)
        draw: dict[str, Callable[[list[str], list[Candidate]], list[np.ndarray]]] = {"diffusers": loop.draw}
        executor = Executor(device="cpu", max_batch=args.max_batch, resolve_model=resolve)
        draw["executor"] = partial(draw_with_executor, executor)
        if not args.untrained:
            fastest = catalog_executor(catalog, torch.device("cpu"), max_batch=args.max_batch)
            draw["engines"] = partial(draw_with_executor, fastest)
        first = {c.name: index for index, c in reversed(list(enumerate(candidates)))}  # warm both up, and compare
        few, theirs = [prompts[i] for i in first.values()], [candidates[i] for i in first.values()]
        pictures = {name: np.stack(own(few, theirs)).astype(int) for name, own in draw.items()}
        plain = pictures.pop("diffusers")
        difference = {name: int(np.abs(own - plain).max()) for name, own in pictures.items()}
        # Engines are built for a batch size when it is first met.
        for own in draw.values():
            own(prompts, candidates)

        wall: dict[str, list[float]] = {name: [] for name in draw}
        cpu: dict[str, list[float]] = {name: [] for name in draw}
        for _ in range(args.rounds):
            for name in wall:
                start, start_cpu = time.perf_counter(), time.process_time()
                draw[name](prompts, candidates)
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)

    seconds = {name: statistics.median(values) for name, values in wall.items()}
    cpu_seconds = {name: statistics.median(values) for name, values in cpu.items()}
    result = {
        "images": len(prompts),
        "candidates": Counter(c.name for c in candidates),
        "images_a_second": {name: len(prompts) / value for name, value in seconds.items()},
        "ratio": {name: seconds["diffusers"] / seconds[name] for name in difference},
        "cpu_seconds": cpu_seconds,
        "cpu_seconds_ratio": {name: cpu_seconds["diffusers"] / cpu_seconds[name] for name in difference},
        "routing_share": {name: statistics.median(routing_seconds) / seconds[name] for name in difference},
        "first_routing_share": {name: routing_seconds[0] / seconds[name] for name in difference},
        "largest_pixel_difference": difference,
        "rounds": args.rounds,
        "max_batch": args.max_batch,
        "untrained": args.untrained,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "torch": torch.__version__},
    }  # fmt: skip
    for name, rate in result["images_a_second"].items():
        print(f"{name:10} {rate:7.3f} images/s")
    for name in difference:
        print(
            f"{name:10} {result['ratio'][name]:7.3f} times diffusers' (of CPU time: "
            f"{result['cpu_seconds_ratio'][name]:.3f}); routing {result['routing_share'][name]:.2%} of the time, "
            f"{result['first_routing_share'][name]:.2%} the first time; largest pixel difference {difference[name]}"
        )
    if args.json:
        write_atomic(args.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
