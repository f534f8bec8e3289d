"""What ``accelerate`` costs or saves where there is no GPU: the same models untouched and accelerated, in turns.

    python bench/bench_cpu.py [--seconds 20] [--threads 1] [--dtype bfloat16 --channels-last] [--sd15]

The built-in catalog's models, a whole picture of its teacher through diffusers' own pipeline, and a UNet of 3 million
parameters; or SD1.5's UNet at 512x512, with random weights. One and the same object is accelerated and restored between
the rounds, so that neither variant has luckier memory. Each round takes both, in random order: some calls until Python
has settled on the changed classes, then as many as take some hundredths of a second, in the process's CPU time. Results
go to ``bench/results/cpu/``, or to the folder that the environment variable OUT names.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from checkout import map_package

map_package()

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from families import SD15, TINY, Family  # noqa: E402
from interleaved import Times  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402
from torch import Tensor  # noqa: E402

from catimage_accel.accelerate import accelerate, restore  # noqa: E402
from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.engines.loading import load_unet  # noqa: E402

CPU = torch.device("cpu")
STEPS = 10
ROWS = (1, 2, 8)
RESAMPLES = 2000
SETTLING, TIMED = 0.02, 0.04  # seconds of calls in a round
PROMPT = "a crown, a dog and a bear on a pink background"

Case = tuple[str, Any, Callable[[], Any]]  # what it is called, what is accelerated, what is timed


def cases(dtype: torch.dtype, layout: torch.memory_format) -> Iterator[Case]:
    """The smallest first."""
    catalog = Catalog.load("emoji")
    pipes = {name: load(catalog, name, dtype, layout) for name in ("teacher-ddim-25", "small-ddim-25")}
    pipe = pipes["teacher-ddim-25"]
    tokens = pipe.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for rows in ROWS:
        yield f"text encoder, {rows} prompts", pipe, partial(pipe.text_encoder, tokens.repeat(rows, 1))
    for name, each in pipes.items():
        for rows in ROWS:
            text = each.text_encoder(tokens.repeat(rows, 1)).last_hidden_state
            yield f"UNet of {name}, {rows} rows", each, partial(run_unet, each.unet, rows, text)
    for rows in ROWS:
        latents = torch.randn(rows, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2, dtype=dtype)
        yield f"decoder, {rows} images", pipe, partial(pipe.vae.decode, latents)
    yield from family_cases(TINY, dtype, layout, ROWS)
    yield f"picture, {STEPS} steps", pipe, partial(pipe, PROMPT, num_inference_steps=STEPS, output_type="np")


def family_cases(
    family: Family, dtype: torch.dtype, layout: torch.memory_format, rows: Sequence[int]
) -> Iterator[Case]:
    """Of a UNet with random weights."""
    unet = family.new_unet(CPU, dtype).to(memory_format=layout)
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    for number in rows:
        text = family.new_conditions(number, CPU, dtype)["encoder_hidden_states"]
        call = partial(run_unet, unet, number, text)
        yield f"UNet of {millions:.1f} M, {number} rows", SimpleNamespace(unet=unet), call


def load(
    catalog: Catalog, name: str, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.preserve_format
) -> StableDiffusionPipeline:
    """A candidate's models in diffusers' own pipeline."""
    candidate = next(candidate for candidate in catalog.candidates if candidate.name == name)
    folder = catalog.resolve_model(candidate.model)
    unet = load_unet(folder, candidate.unet, dtype)
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=unet, safety_checker=None, torch_dtype=dtype)
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=layout)
    assert isinstance(pipe.vae, AutoencoderKL)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_unet(unet: UNet2DConditionModel, rows: int, text: Tensor) -> Tensor:
    """One call; the text is the same from call to call, as within a pipeline."""
    side = unet.config.sample_size
    sample = torch.zeros(rows, unet.config.in_channels, side, side, dtype=unet.dtype)
    return unet(sample, torch.tensor(500), text, return_dict=False)[0]


@torch.no_grad()
def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Rounds for about that long, ten at least."""
    title, pipe, call = case
    times: dict[str, list[float]] = {"untouched": [], "accelerated": []}
    order, end = random.Random(0), time.monotonic() + seconds
    while len(times["untouched"]) < 10 or time.monotonic() < end:
        for variant in order.sample(list(times), len(times)):
            (accelerate if variant == "accelerated" else restore)(pipe)
            repeat(call, SETTLING)
            times[variant].append(repeat(call, TIMED))
    restore(pipe)
    plain, ours = (Times(rounds) for rounds in times.values())
    low, high = interval(plain, ours)
    return {
        "case": title, "untouched": plain.figures(), "accelerated": ours.figures(),
        "times as fast": ours.times_as_fast_as(plain), "interval": [low, high],
    }  # fmt: skip


def repeat(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call, of those that take about that long."""
    start, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - start < seconds:
        call()
        calls += 1
    return 1000 * (time.process_time() - start) / calls


def interval(plain: Times, ours: Times) -> tuple[float, float]:
    """95%, by bootstrap over the rounds, of how many times as fast ``ours`` is."""
    draw = random.Random(1)
    found = []
    for _ in range(RESAMPLES):
        picked = draw.choices(range(len(ours.rounds)), k=len(ours.rounds))
        one, other = (Times([times.rounds[i] for i in picked]) for times in (ours, plain))
        found.append(one.times_as_fast_as(other))
    found.sort()
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]


def main() -> None:
    """Measures, saves, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all models")
    parser.add_argument("--channels-last", action="store_true", help="UNets and decoder in that memory format")
    parser.add_argument("--sd15", action="store_true", help="SD1.5's UNet, 2 rows, instead")
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = about(CPU, dtype) | {"channels_last": args.channels_last}
    rows = []
    path = result_file("accelerate", CPU, facts["date"])
    for case in family_cases(SD15, dtype, layout, (2,)) if args.sd15 else cases(dtype, layout):
        rows.append(measure(case, args.seconds))
        save(path, facts, rows)
    table = [
        [
            row["case"], f"{row['untouched']['ms']:.2f}", f"{row['accelerated']['ms']:.2f}",
            f"{row['times as fast']:.3f}", "{:.3f} to {:.3f}".format(*row["interval"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["", "untouched ms", "accelerated ms", "times as fast", "95% interval"]
    kind = f"{args.dtype}{', channels_last' if args.channels_last else ''}"
    print_table(f"accelerate() on {facts['device']}, {args.threads} threads, {kind}; {path}", columns, table)


if __name__ == "__main__":
    main()
