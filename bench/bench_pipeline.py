"""Whole images: guided denoising steps and the decoder, eager, compiled, accelerated, and both, in one process.

    python bench/bench_pipeline.py [--model sdxl] [--steps 30] [--images 1 8] [--dtype float16] [--seconds 400]

from a plain checkout: torch, triton and diffusers are enough, so what is run is the loop of diffusers' SDXL pipeline
(Euler, guidance 5, both halves in one call, then the decoder) without its text encoders: their results are random
numbers, as the weights are. The decoder runs in ``--dtype``, like those that were made fit for float16. Without a CUDA
device a tiny pipeline in float32 and a few steps stand in, and nothing is compiled unless ``--compile`` is given.
A round takes long here, so that the time for them is a part of ``--seconds``: compiling ends that much earlier. Results
go where those of ``bench_unet.py`` go.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from checkout import map_package

map_package()

import torch  # noqa: E402
from diffusers import EulerDiscreteScheduler  # noqa: E402
from families import FAMILIES, Family  # noqa: E402
from interleaved import interleave, warm_up_in_portions  # noqa: E402
from measure import the_device  # noqa: E402
from reporting import SMALL, about, add_common_options, keep, print_table, result_file  # noqa: E402
from torch import Tensor  # noqa: E402
from variants import VARIANTS, Variant, Weights, is_compiled, outcome, ratio_cells  # noqa: E402

GUIDANCE = 5.0
LEAST_ROUNDS = 3
MEASURING_SECONDS = {"cuda": 60.0, "cpu": 8.0}
SECONDS = 400.0  # the last round may begin at the end of them


def draw(pipe: SimpleNamespace, noise: Tensor, conditions: dict[str, Any], steps: int) -> Tensor:
    """The pictures, (images, 3, height, width), on the device."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    # The pipeline makes its own text tensor in every call: what is kept of another call's is of no use.
    conditions = conditions | {"encoder_hidden_states": conditions["encoder_hidden_states"].clone()}
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        if noise.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        without, with_text = pipe.unet(sample, timestep, return_dict=False, **conditions)[0].chunk(2)
        guided = without + GUIDANCE * (with_text - without)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


def call_of(
    weights: Weights, variant: Variant, noise: Tensor, conditions: dict[str, Any], args: argparse.Namespace
) -> Callable[[int], Tensor]:
    """Draws in so many steps. Built when first called, so that an error is the variant's own."""
    pipes: list[SimpleNamespace] = []

    def call(steps: int) -> Tensor:
        if not pipes:
            pipes.append(weights.pipeline(variant, mode=args.mode))
        return draw(pipes[0], noise.to(memory_format=variant.memory_format), conditions, steps)

    return call


@torch.no_grad()
def measure(
    family: Family, images: int, variants: list[Variant], args: argparse.Namespace, until: float
) -> Iterator[list[dict[str, Any]]]:
    """A row a variant, of each portion."""
    device = the_device()
    torch.compiler.reset()  # each size gets graphs of its own
    weights = Weights(unet=family.new_unet(device, args.dtype), vae=family.new_vae(device, args.dtype))
    noise = family.new_latents(images, device, args.dtype)
    conditions = family.new_conditions(2 * images, device, args.dtype)
    calls = {each.name: call_of(weights, each, noise, conditions, args) for each in variants}
    short = {name: partial(call, 2) for name, call in calls.items()}
    measuring = args.measuring or MEASURING_SECONDS[device.type]
    for run, not_run in warm_up_in_portions(short, is_compiled, until=until - measuring):
        whole = {name: partial(calls[name], args.steps) for name in run}
        times = interleave(whole, device, seconds=measuring, least=LEAST_ROUNDS, until=until)
        start = {"model": family.name, "steps": args.steps, "images": images}
        yield [
            start | {"variant": name} | outcome(name, times, {}, not_run)
            | ({"images_a_second": 1000 * images / times[name].ms} if name in times else {})
            for name in calls
        ]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """Of the table."""
    start = [f"{row['model']}, {row['steps']} steps, {row['images']} images", row["variant"]]
    if "ms" not in row:
        return [*start, row["not_run"][:40], "", "", ""]
    return [
        *start, f"{row['ms']:.1f}", f"{row['images_a_second']:.3f}",
        *ratio_cells(row),
    ]  # fmt: skip


def main() -> None:
    """Measures, saves after each portion of a size, prints."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sdxl", "tiny"), default="sdxl" if cuda else "tiny")
    parser.add_argument("--steps", type=int, default=30 if cuda else 4)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8] if cuda else [1])
    add_common_options(parser)
    parser.set_defaults(seconds=SECONDS)
    args = parser.parse_args()
    device, until = the_device(), time.monotonic() + args.seconds
    facts = about(device, args.dtype)
    path = result_file("pipeline", device, facts["date"])
    rows: list[dict[str, Any]] = []
    variants = [variant for variant in VARIANTS if args.compile or not variant.compiled]
    for images in args.images:
        keep(path, facts, rows, measure(FAMILIES[args.model], images, variants, args, until))
    columns = ["", "variant", "ms", "images/s", "x eager", "x compile"]
    title = f"Images with their decoding, {facts['dtype']}, {facts['device']}; {path}"
    print_table(title, columns, [cells(row) for row in rows])
    if not cuda:
        print(SMALL)


if __name__ == "__main__":
    main()
