"""What the micro-benchmarks share: the calls to time, what a device can do at most, and what a time means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import zip_longest
from typing import Any

import torch

from catimage_accel.kernels.tuning.timing import DeviceTimer, Timing
from catimage_accel.kernels.tuning.workload import SMALL_STAGES, Arguments, Workload

Calls = dict[str, Callable[[], Any]]
Baselines = Callable[[Arguments], Calls]

OURS = ("triton", "cuda")
UNCOMPILED = (*OURS, "eager")
COMMON = (*UNCOMPILED, "torch.compile")
ONE_CALL = ("attention", "int8_linear", "int8_conv")  # eager calls a library once, and torch.compile the same one
BATCHES = (2, 16)
LARGE_BYTES = 32 * 2**20  # of an image from which on GroupNorm has a goal
COPY_BYTES = 2**31
MATMUL_SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do at most."""

    floor_ms: float  # the least that any call takes: writing one value
    copy_gb_s: float  # device to device, bytes read plus bytes written
    matmul_tflop_s: dict[str, float]  # by dtype


def the_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def workloads(op: str, batches: tuple[int, ...] = BATCHES) -> list[Workload]:
    """SD1.5 and SDXL in float16 where there is a GPU; else a few small ones in float32, which say so."""
    make = import_module(f"catimage_accel.kernels.{op}.workload").workloads
    if torch.cuda.is_available():
        return [workload for batch in batches for workload in make(batch, torch.float16)]
    return list(make(1, torch.float32, SMALL_STAGES))


def by_goal(queues: Iterable[list[Workload]]) -> list[Workload]:
    """Those first that a goal is set for, then one of each op after the other, so that every op has some in the end."""
    turns = [one for turn in zip_longest(*queues) for one in turn if one is not None]
    return sorted(turns, key=_goal)


def _goal(workload: Workload) -> int:
    if workload.op == "group_norm" and workload.bytes >= 2 * LARGE_BYTES:  # read once, written once
        return 0
    return 1 if workload.op == "attention" else 2


def workload_id(workload: Workload) -> str:
    """The test id: what runs, and whether it is a CPU's small stand-in."""
    dtype = str(workload.dtype).removeprefix("torch.")
    return f"{workload.name}, {dtype}" + ("" if torch.cuda.is_available() else ", small (CPU)")


def calls(workload: Workload, arguments: Arguments, baselines: Baselines | None = None) -> Calls:
    """Every implementation by name, ready to be called. One that cannot run says why when it is called."""
    names = (*OURS, *workload.libraries)
    found: Calls = {impl: partial(workload.call, **arguments, impl=impl) for impl in names}
    # A quantized layer's definition is there to be exact: what it is held against is the layer without quantization.
    plain = workload.rival(arguments) if workload.rival else partial(workload.call, **arguments, impl="reference")
    found["eager"] = plain
    if workload.op not in ONE_CALL:
        torch.compiler.reset()  # each workload gets a graph of its own shapes
        compiled = torch.compile(plain.func, fullgraph=True, dynamic=False)
        found["torch.compile"] = partial(compiled, *plain.args, **plain.keywords)
    return found | (baselines(arguments) if baselines else {})


@torch.no_grad()
def measure_ceilings(device: torch.device, timer: DeviceTimer) -> Ceilings:
    """A tiny write, a large copy, and a large matrix product of random numbers."""
    floor = timer.time(torch.empty(1, device=device).zero_).ms
    source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    copy = timer.time(partial(target.copy_, source)).ms
    del source, target
    rates = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=device).to(dtype)
        rates[str(dtype)] = 2 * MATMUL_SIDE**3 / timer.time(partial(torch.mm, a, b)).ms / 1e9
    return Ceilings(floor, 2 * COPY_BYTES / copy / 1e6, rates)


def meaning(workload: Workload, timing: Timing, ceilings: Ceilings) -> dict[str, Any]:
    """A time as rates, and as shares of what the device can do."""
    gb_s, tflop_s = workload.bytes / timing.ms / 1e6, workload.flops / timing.ms / 1e9
    return {
        "ms": timing.ms, "p20": timing.p20, "p80": timing.p80, "repeats": timing.repeats, "cuda_graph": timing.graph,
        "gb_s": gb_s, "tflop_s": tflop_s, "percent_of_copy": 100 * gb_s / ceilings.copy_gb_s,
        "percent_of_matmul": 100 * tflop_s / ceilings.matmul_tflop_s[str(workload.dtype)],
    }  # fmt: skip
