"""What diffusion pipelines ask of the ops: the calls that are tuned, checked and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from catimage_accel.kernels.accuracy import allowed_error, excess_error, largest_error

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One resolution of a UNet: its latents are ``side`` x ``side``; ``heads`` is 0 where it has no transformer."""

    name: str
    channels: int
    side: int
    heads: int


SD15_STAGES = (
    Stage("SD1.5 64x64", 320, 64, 8),
    Stage("SD1.5 32x32", 640, 32, 8),
    Stage("SD1.5 16x16", 1280, 16, 8),
    Stage("SD1.5 8x8", 1280, 8, 8),
)
SDXL_STAGES = (
    Stage("SDXL 128x128", 320, 128, 0),
    Stage("SDXL 64x64", 640, 64, 10),
    Stage("SDXL 32x32", 1280, 32, 20),
)
STAGES = (*SD15_STAGES, *SDXL_STAGES)  # of 512x512 and of 1024x1024 pixels
SMALL_STAGES = (SD15_STAGES[-1], Stage("SD1.5 16x16, fewer channels", 320, 16, 8))  # for machines without a GPU
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Workload:
    """One call of an op, and the least work that it is."""

    op: str
    name: str
    batch: int
    dtype: torch.dtype
    call: Callable[..., Any]  # the public op
    make: Callable[[torch.dtype, torch.device], Arguments]  # its arguments, random tensors among them
    shape: dict[str, int] = field(default_factory=dict)  # what ``launch_config`` is asked for
    flops: int = 0
    bytes: int = 0  # inputs read once, results written once
    exact_as_is: tuple[str, ...] = ()  # tensor arguments that the op takes in one dtype only
    unquantized: Arguments = field(default_factory=dict)  # what to change in the arguments so that it stays unrounded
    libraries: tuple[str, ...] = ()  # further implementations of the op, through torch's own ops
    # The same layer in ``dtype``, where the op is a quantized one: its time is what INT8 has to beat.
    rival: Callable[[Arguments], partial[Any]] | None = None

    def arguments(self, device: torch.device, seed: int = 0) -> Arguments:
        """Fresh arguments, the same for the same seed."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.make(self.dtype, device)

    def run(self, arguments: Arguments, impl: str | None) -> tuple[Tensor, ...]:
        """The results of an implementation."""
        results = self.call(**arguments, impl=impl)
        return results if isinstance(results, tuple) else (results,)

    def exact(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The results of the definition in float64."""
        return self.unrounded(arguments, torch.float64)

    def unrounded(self, arguments: Arguments, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The results of the definition in ``dtype``, not quantized."""
        upcast = {
            name: value.to(dtype) if isinstance(value, Tensor) and name not in self.exact_as_is else value
            for name, value in (arguments | self.unquantized).items()
        }
        return self.run(upcast | ({"out_dtype": dtype} if "out_dtype" in arguments else {}), "reference")


@dataclass(frozen=True)
class Expected:
    """What the results of one workload are held against."""

    exact: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...]
    allowed: tuple[float, ...]
    scale: float | None = None  # of the results that are int8, if those are a quantized real value

    @classmethod
    @torch.no_grad()
    def of(cls, workload: Workload, arguments: Arguments) -> Expected:
        """The definition in float64, and what torch's own op in the arguments' dtype makes of it."""
        plain = workload.run(arguments, "reference")
        dtypes = tuple(one.dtype for one in plain)
        if all(dtype == torch.int8 for dtype in dtypes) and not workload.unquantized:  # rounding is all that it does
            return cls(tuple(one.double() for one in plain), dtypes, (0.0,) * len(plain))
        exact = workload.exact(arguments)
        if workload.unquantized:
            # What kernels round they have in float32, whatever the dtype of the arguments.
            plain = tuple(
                wide if one.dtype == torch.int8 else one
                for one, wide in zip(plain, workload.unrounded(arguments, torch.float32), strict=True)
            )
        allowed = tuple(allowed_error(one, true) for one, true in zip(plain, exact, strict=True))
        return cls(exact, dtypes, allowed, arguments["output_scale"] if workload.unquantized else None)

    def poison(self) -> None:
        """Leaves NaN in the memory that the next results are given, so that a value that is never written shows."""
        for_results = [
            torch.full(exact.shape, math.nan if dtype.is_floating_point else 85, dtype=dtype, device=exact.device)
            for exact, dtype in zip(self.exact, self.dtypes, strict=True)
        ]
        del for_results

    def share(self, results: tuple[Tensor, ...]) -> float:
        """The largest error as a share of what the accuracy rule allows: above 1, or NaN, is wrong."""
        shares = [0.0]
        for result, exact, dtype, allowed in zip(results, self.exact, self.dtypes, self.allowed, strict=True):
            if (result.shape, result.dtype) != (exact.shape, dtype):
                return math.nan
            quantized = self.scale if dtype == torch.int8 else None
            error = largest_error(result, exact) if quantized is None else excess_error(result, exact, quantized)
            shares.append(0.0 if error == 0 else error / allowed if allowed else math.inf)
        return math.nan if any(map(math.isnan, shares)) else max(shares)


def by_shape(workloads: Iterable[Workload]) -> list[list[Workload]]:
    """Workloads that get the same launch config, together."""
    groups: dict[tuple[tuple[str, int], ...], list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(tuple(workload.shape.items()), []).append(workload)
    return list(groups.values())
