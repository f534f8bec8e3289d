"""One call of the UNet: eager, compiled, accelerated, and both, on the same weights in one process.

    python bench/bench_unet.py [--models sd15 sdxl] [--rows 2 16] [--dtype float16] [--seconds 540]

from a plain checkout: torch, triton and diffusers are enough. Weights are random, shapes are SD1.5's at 512x512 and
SDXL's at 1024x1024; with guidance an image is two rows. Medians of CUDA events; a ratio is the median of those within
rounds. As in a pipeline, text stays the same from call to call, so that an accelerated UNet projects it once.
Compiling SDXL takes minutes: ``--models`` and ``--rows`` split the work, and of each size what needs no compiling is
measured and saved before. Without a CUDA device a tiny UNet in float32 stands in, and nothing is compiled unless
``--compile`` is given; what is checked then is that ``accelerate`` makes nothing slower. Results go to
``bench/results/<device>/``, or to the folder that the environment variable OUT names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from checkout import map_package

map_package()

import torch  # noqa: E402
from families import FAMILIES, Family  # noqa: E402
from interleaved import interleave, warm_up_in_portions  # noqa: E402
from measure import the_device  # noqa: E402
from reporting import SMALL, about, add_common_options, keep, print_table, result_file  # noqa: E402
from torch import Tensor  # noqa: E402
from variants import VARIANTS, Variant, Weights, is_compiled, outcome, ratio_cells  # noqa: E402

TIMESTEP = 500
MEASURING_SECONDS = {"cuda": 8.0, "cpu": 12.0}


def call_of(
    weights: Weights, variant: Variant, latents: Tensor, conditions: dict[str, Any], mode: str
) -> Callable[[], Tensor]:
    """Built when first called, so that an error is the variant's own."""
    ready: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not ready:
            unet = weights.pipeline(variant, mode=mode).unet
            sample = latents.to(memory_format=variant.memory_format)
            timestep = torch.tensor(TIMESTEP, device=latents.device)
            ready.append(partial(unet, sample, timestep, return_dict=False, **conditions))
        if variant.compiled and latents.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return ready[0]()[0]

    return call


@torch.no_grad()
def measure(
    family: Family, rows: int, variants: list[Variant], args: argparse.Namespace, until: float
) -> Iterator[list[dict[str, Any]]]:
    """A row a variant, of each portion."""
    device = the_device()
    torch.compiler.reset()  # each size gets graphs of its own
    weights = Weights(unet=family.new_unet(device, args.dtype))
    latents = family.new_latents(rows, device, args.dtype)
    conditions = family.new_conditions(rows, device, args.dtype)
    calls = {each.name: call_of(weights, each, latents, conditions, args.mode) for each in variants}
    for run, not_run in warm_up_in_portions(calls, is_compiled, until=until):
        results = {name: call().float() for name, call in run.items()}
        times = interleave(run, device, seconds=args.measuring or MEASURING_SECONDS[device.type])
        start = {"model": family.name, "rows": rows}
        yield [start | {"variant": name} | outcome(name, times, results, not_run) for name in calls]


def cells(row: dict[str, Any]) -> list[str]:
    """Of the table."""
    start = [f"{row['model']}, {row['rows']} rows", row["variant"]]
    if "ms" not in row:
        return [*start, row["not_run"][:40], "", "", ""]
    return [
        *start, f"{row['ms']:.2f}", *ratio_cells(row),
        f"{row['difference']:.1e}" if "difference" in row else "",
    ]  # fmt: skip


def main() -> None:
    """Measures, saves after each portion of a size, prints."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=["sd15", "sdxl"] if cuda else ["tiny"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2, 16] if cuda else [2])
    add_common_options(parser)
    args = parser.parse_args()
    device, until = the_device(), time.monotonic() + args.seconds
    facts = about(device, args.dtype)
    path = result_file("unet", device, facts["date"])
    rows: list[dict[str, Any]] = []
    variants = [variant for variant in VARIANTS if args.compile or not variant.compiled]
    for model in args.models:
        for count in args.rows:
            keep(path, facts, rows, measure(FAMILIES[model], count, variants, args, until))
    columns = ["", "variant", "ms", "x eager", "x compile", "difference"]
    print_table(f"One UNet call, {facts['dtype']}, {facts['device']}; {path}", columns, [cells(row) for row in rows])
    if not cuda:
        print(SMALL)


if __name__ == "__main__":
    main()
