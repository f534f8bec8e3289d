"""Measures which launch config suits an op best on a CUDA device."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime import driver

from catimage_accel.kernels.tuning import device_slug, launch_config, read_entries, use_config
from catimage_accel.kernels.tuning.timing import DeviceTimer
from catimage_accel.kernels.tuning.workload import Arguments, Expected, Workload, by_shape

# The quickest first.
TUNED_OPS = ("int8_quantize", "geglu", "layer_norm", "attention", "group_norm", "int8_linear", "int8_conv")
BATCHES = (2, 16)
DTYPE = torch.float16
RIVAL = "rival"

Config = dict[str, int]

_one_check = Lock()  # comparing large results in every thread at once would fill the device's memory


@dataclass(frozen=True)
class Tuned:
    """The outcome for one shape."""

    op: str
    shape: dict[str, int]
    config: Config
    default: Config
    impl: str | None  # the fastest one, "triton", "cuda" or a library's, where the op has others than triton
    ms: dict[str, dict[str, float]]  # workload -> {"tuned": ..., "default": ..., "cuda": ..., "rival": ...}
    tried: int
    failed: dict[str, str]  # config, or implementation -> why it was not timed
    speedup: float | None = None  # of a quantized layer's fastest implementation over the same work in half precision

    @property
    def entry(self) -> dict[str, Any]:
        """As the op's JSON file has it."""
        measured = {"impl": self.impl, "speedup": self.speedup and round(self.speedup, 3)}
        return {"shape": self.shape, "config": self.config, **{name: x for name, x in measured.items() if x}}


def tune(
    op: str, device: torch.device, *, until: float = math.inf, workers: int | None = None
) -> Iterator[Tuned]:  # fmt: skip
    """Yields the best config of each representative shape of ``op``, those first that the device's file lacks.

    Configs are compiled in ``workers`` threads, checked against the reference by the accuracy rule, then timed one by
    one. The best is the one with the smallest geometric mean of times over the shape's workloads; where the op has
    other implementations (CUDA kernels, a library's), and where it is a quantized layer the same work in half
    precision, they are held against it the same way.

    Args:
        op: One of ``TUNED_OPS``.
        device: A CUDA device.
        until: No shape is begun after this ``time.monotonic()``.
        workers: As many as there are cores, at most 16, where ``None``.
    """
    module = import_module(f"catimage_accel.kernels.{op}.workload")
    index = torch.cuda.current_device() if device.index is None else device.index
    shared_memory = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    timer = DeviceTimer(device, seconds=0.01)
    workers = workers or min(16, os.cpu_count() or 1)
    groups = by_shape(workload for batch in BATCHES for workload in module.workloads(batch, DTYPE))
    known = [entry["shape"] for entry in read_entries(op, device_slug(device)) or ()]
    groups.sort(key=lambda group: group[0].shape in known)
    with ThreadPoolExecutor(workers, initializer=torch.cuda.set_device, initargs=(index,)) as pool:
        for group in groups:
            if time.monotonic() > until:
                return
            default = launch_config(op, torch.device("cpu"), **group[0].shape)
            others = [config for config in module.configs(group[0].shape, shared_memory) if config != default]
            yield tune_shape(group, [default, *others], device, timer, pool)


@torch.no_grad()
def tune_shape(
    group: list[Workload], candidates: list[Config], device: torch.device, timer: DeviceTimer, pool: ThreadPoolExecutor
) -> Tuned:
    """The best of ``candidates``, the default the first of them, for workloads that share a shape."""
    op, shape = group[0].op, group[0].shape
    failed: dict[str, str] = {}
    alive = candidates
    for workload in group:
        if workload.batch == min(BATCHES):
            arguments = workload.arguments(device)
            expected = Expected.of(workload, arguments)
            reasons = list(pool.map(partial(_try, workload, arguments, expected, "triton"), alive))
            failed |= {str(c): reason for c, reason in zip(alive, reasons, strict=True) if reason}
            alive = [c for c, reason in zip(alive, reasons, strict=True) if not reason]
            for impl in ("cuda", *workload.libraries):
                if reason := _try(workload, arguments, expected, impl, None):
                    failed[impl] = reason
    default = candidates[0]
    if default not in alive:
        raise RuntimeError(f"{op} {shape}: the default config fails: {failed[str(default)]}")
    times: dict[str, list[float]] = {}
    others: dict[str, dict[str, float]] = {}  # implementation -> workload -> ms
    for workload in group:
        arguments = workload.arguments(device)
        call = partial(workload.run, arguments, "triton")
        times[workload.name] = [_time(op, config, call, timer) for config in alive]
        calls: dict[str, Callable[[], Any]] = {
            impl: partial(workload.run, arguments, impl) for impl in ("cuda", *workload.libraries)
        }
        if workload.rival is not None:
            calls[RIVAL] = workload.rival(arguments)
        for name, other in calls.items():
            if name not in failed:
                others.setdefault(name, {})[workload.name] = timer.time(other).ms
    totals = [sum(math.log(ms[i]) for ms in times.values()) for i in range(len(alive))]
    best = min(range(len(alive)), key=totals.__getitem__)
    sums = {"triton": totals[best]} | {name: sum(map(math.log, found.values())) for name, found in others.items()}
    rival = sums.pop(RIVAL, None)
    fastest = min(sums, key=sums.__getitem__)
    ms = {
        name: {"tuned": found[best], "default": found[0]} | {other: ms[name] for other, ms in others.items()}
        for name, found in times.items()
    }
    return Tuned(
        op, shape, alive[best], default, fastest if len(sums) > 1 else None, ms, len(candidates), failed,
        None if rival is None else math.exp((rival - sums[fastest]) / len(group)),
    )  # fmt: skip


def _time(op: str, config: Config, call: Callable[[], Any], timer: DeviceTimer) -> float:
    with use_config(op, config):
        return timer.time(call).ms


def _try(
    workload: Workload, arguments: Arguments, expected: Expected, impl: str, config: Config | None
) -> str | None:  # fmt: skip
    """Why an implementation, or a launch config of it, is not to be used, if so."""
    try:
        with use_config(workload.op, config) if config else nullcontext(), torch.no_grad():
            expected.poison()
            results = workload.run(arguments, impl)
            with _one_check:
                share = expected.share(results)
    # No such implementation; out of shared memory or registers; not what the compiler takes.
    except (ValueError, TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if share <= 1 else f"error is {share:.2f} of what is allowed"
