"""The C++ kernel of ``group_norm`` on the CPU, with SiLU and the time embedding, beside torch's ops and torch.compile.

    python bench/bench_cpu_group_norm.py [--seconds 2] [--threads 1] [--no-compile]

Shapes of the built-in catalog's UNet, of SD1.5's and of a decoder's last blocks; float32 and bfloat16; both layouts.
They take turns. A compiled one is timed as it runs within a larger graph: without the check of its inputs, which takes
longer than a small norm. Results go to ``bench/results/cpu/``, or to the folder that the environment variable OUT
names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from checkout import map_package

map_package()

import torch  # noqa: E402
from interleaved import Times, interleave  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._inductor.compile_fx import compile_fx  # noqa: E402
from torch.nn.functional import silu  # noqa: E402

from catimage_accel.kernels import cpu, group_norm  # noqa: E402
from catimage_accel.kernels.build import CPU  # noqa: E402

SHAPES = {
    "catalog's teacher": ((2, 64, 32, 32), (2, 128, 16, 16), (2, 192, 8, 8)),
    "SD1.5's UNet": ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8)),
    "SD's decoder": ((1, 512, 64, 64), (1, 256, 256, 256), (1, 128, 512, 512)),
}
GROUPS, EPS = 32, 1e-5
CALLS_TAKE = 0.005  # seconds, at least


def torchs(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """What diffusers runs."""
    return silu(torch.group_norm(x + shift[:, :, None, None], GROUPS, weight, bias, EPS))


def compiled(arguments: tuple[Tensor, ...]) -> Callable[[], Any]:
    """What torch.compile makes of it, to be called."""
    kept: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        kept.append((compile_fx(graph, inputs), inputs))
        return graph

    torch.compiler.reset()
    torch.compile(torchs, backend=keep, fullgraph=True, dynamic=False)(*arguments)
    call, inputs = kept[0]
    return partial(call, *inputs)


def repeated(call: Callable[[], Any]) -> tuple[Callable[[], None], int]:
    """As many calls as take some milliseconds, and how many those are."""
    call()
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < CALLS_TAKE:
        call()
        number += 1

    def several() -> None:
        for _ in range(number):
            call()

    return several, number


@torch.no_grad()
def measure(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, seconds: float, with_compile: bool
) -> dict[str, Any]:
    """Milliseconds of each, and how many times as fast as torch's ops."""
    x = torch.randn(shape).to(dtype).to(memory_format=layout)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    shift = torch.randn(shape[:2]).to(dtype)
    ours = partial(group_norm, x, GROUPS, weight, bias, EPS, activation="silu", shift=shift, impl="cpu")
    calls = {"torch": partial(torchs, x, weight, bias, shift), "C++": ours}
    if with_compile:
        calls["torch.compile"] = compiled((x, weight, bias, shift))
    several = {name: repeated(call) for name, call in calls.items()}
    rounds = {name: run for name, (run, _) in several.items()}
    found = interleave(rounds, torch.device("cpu"), seconds=seconds, wall=torch.get_num_threads() > 1)
    times = {name: Times([value / several[name][1] for value in found[name].rounds]) for name in found}
    return {
        "shape": shape, "dtype": str(dtype).removeprefix("torch."), "layout": str(layout).removeprefix("torch."),
    } | {
        name: each.figures() | {"times as fast": each.times_as_fast_as(times["torch"])} for name, each in times.items()
    }  # fmt: skip


def main() -> None:
    """Measures, saves, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not cpu.BUILT:
        parser.error(f"the kernels are not built: {CPU.how_to_build}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = about(torch.device("cpu"), torch.float32)
    path, rows = result_file("group-norm", torch.device("cpu"), facts["date"]), []
    for model, shapes in SHAPES.items():
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    row = measure(shape, dtype, layout, args.seconds, args.compile)
                    rows.append({"model": model} | row)
                    save(path, facts, rows)
    names = ["torch", "C++", *(["torch.compile"] if args.compile else [])]
    table = [
        [
            row["model"], f"{row['shape']}, {row['dtype']}, {row['layout']}",
            *(f"{row[name]['ms']:.3f} ({row[name]['times as fast']:.2f})" for name in names),
        ]
        for row in rows
    ]  # fmt: skip
    title = f"GroupNorm + time embedding + SiLU, {facts['device']}, {args.threads} threads; {path}"
    print_table(title, ["", "", *(f"{name}, ms (times as fast)" for name in names)], table)


if __name__ == "__main__":
    main()
