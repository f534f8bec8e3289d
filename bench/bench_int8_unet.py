"""One call of the UNet in INT8 by the package's kernels, against the same weights in half precision.

    python bench/bench_int8_unet.py [--models sdxl sd15] [--rows 2 16] [--seconds 540]

from a plain checkout: torch, triton, diffusers and pydantic are enough. Weights are random, shapes are SDXL's at
1024x1024 and SD1.5's at 512x512; scales are the largest values of one call, so times are those of a calibrated UNet and
pictures are not. Layers that the device's tuning data says are slower in INT8 stay in half precision: run
``make device-check`` or ``catimage bench tune`` first. Medians of CUDA events; a ratio is the median of those within
rounds. Without a CUDA device a tiny UNet in float32 stands in and the INT8 ops run by their definitions, in float64:
what is checked then is that it runs, and its difference. Results go to ``bench/results/<device>/``, or to the folder
that the environment variable OUT names.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
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
from torch import Tensor, nn  # noqa: E402
from variants import COMPILED, EAGER, is_compiled, outcome, ratio_cells  # noqa: E402

from catimage_accel.engines.int8.swap import swap_layers  # noqa: E402
from catimage_accel.quantize.layers import quantizable_layers  # noqa: E402
from catimage_accel.quantize.quantization import LayerQuantization, Quantization  # noqa: E402

KEPT = {"conv_in": "first convolution", "conv_out": "last convolution"}
MEASURING_SECONDS = {"cuda": 8.0, "cpu": 12.0}
TIMESTEP = 500


def scales_of_one_call(unet: nn.Module, call: Callable[[], Any]) -> Quantization:
    """The largest absolute weights and inputs of every layer but the first and the last."""
    found: dict[str, LayerQuantization] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Tensor, ...]) -> None:
            weights = layer.weight.float().flatten(1).abs().amax(1)
            found[name] = LayerQuantization(weights.cpu(), arguments[0].float().abs().max().cpu())

        return hook

    layers = {name: layer for name, layer in quantizable_layers(unet).items() if name not in KEPT}
    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    call()
    for one in hooks:
        one.remove()
    return Quantization("int8", "int8", found, KEPT, "0" * 64)


@torch.no_grad()
def measure(family: Family, rows: int, args: argparse.Namespace, until: float) -> Iterator[list[dict[str, Any]]]:
    """A row a variant, of each portion."""
    device = the_device()
    torch.compiler.reset()  # each size gets graphs of its own
    plain = family.new_unet(device, args.dtype).to(memory_format=torch.channels_last)
    latents = family.new_latents(rows, device, args.dtype).to(memory_format=torch.channels_last)
    conditions = family.new_conditions(rows, device, args.dtype)
    timestep = torch.tensor(TIMESTEP, device=device)

    def call(unet: Any, compiled: bool = False) -> Tensor:
        if compiled and device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return unet(latents, timestep, return_dict=False, **conditions)[0]

    int8 = copy.deepcopy(plain)
    scales = scales_of_one_call(plain, partial(call, plain))
    choices = swap_layers(int8, scales, str(args.dtype).removeprefix("torch."), partial(call, int8), device)
    calls = {EAGER.name: partial(call, plain), "INT8": partial(call, int8)}
    if args.compile:
        for name, unet in ((COMPILED.name, plain), ("INT8 + compile", int8)):
            made = torch.compile(unet, mode=args.mode, fullgraph=True, dynamic=False)
            calls[name] = partial(call, made, True)
    layers = dict(Counter(choice.precision for choice in choices))
    for run, not_run in warm_up_in_portions(calls, is_compiled, until=until):
        results = {name: one().float() for name, one in run.items()}
        times = interleave(run, device, seconds=args.measuring or MEASURING_SECONDS[device.type])
        yield [
            {"model": family.name, "rows": rows, "variant": name}
            | ({"layers": layers} if name.startswith("INT8") else {})
            | outcome(name, times, results, not_run)
            for name in calls
        ]


def cells(row: dict[str, Any]) -> list[str]:
    """Of the table."""
    start = [f"{row['model']}, {row['rows']} rows", row["variant"]]
    layers = ", ".join(f"{number} {precision}" for precision, number in row.get("layers", {}).items())
    if "ms" not in row:
        return [*start, row["not_run"][:40], "", "", "", layers]
    difference = f"{row['difference']:.1e}" if "difference" in row else ""
    return [*start, f"{row['ms']:.2f}", *ratio_cells(row), difference, layers]


def main() -> None:
    """Measures, saves after each portion of a size, prints."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=["sdxl"] if cuda else ["tiny"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2, 16] if cuda else [2])
    add_common_options(parser)
    args = parser.parse_args()
    device, until = the_device(), time.monotonic() + args.seconds
    facts = about(device, args.dtype)
    path = result_file("int8-unet", device, facts["date"])
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for count in args.rows:
            keep(path, facts, rows, measure(FAMILIES[model], count, args, until))
    columns = ["", "variant", "ms", "x eager", "x compile", "difference", "layers"]
    print_table(f"One UNet call, {facts['dtype']}, {facts['device']}; {path}", columns, [cells(row) for row in rows])
    if not cuda:
        print(SMALL, "INT8 ops run by their definitions, in float64.")


if __name__ == "__main__":
    main()
