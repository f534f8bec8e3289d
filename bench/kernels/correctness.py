"""What every implementation of every op is checked on, on a device, by the accuracy rule.

Besides what SD1.5 and SDXL ask for: sizes that end inside a block, strided inputs, values that are hard on a sum, and
tensors of more than 2^31 elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from measure import OURS

from catimage_accel.kernels.attention.workload import of_size as attention_of_size
from catimage_accel.kernels.geglu.workload import of_size as geglu_of_size
from catimage_accel.kernels.group_norm.workload import of_size as group_norm_of_size
from catimage_accel.kernels.guided_step.workload import of_size as guided_step_of_size
from catimage_accel.kernels.int8_conv.workload import of_size as int8_conv_of_size
from catimage_accel.kernels.int8_linear.workload import of_size as int8_linear_of_size
from catimage_accel.kernels.int8_quantize.workload import of_size as int8_quantize_of_size
from catimage_accel.kernels.layer_norm.workload import of_size as layer_norm_of_size
from catimage_accel.kernels.tuning.workload import Arguments, Expected, Workload

OPS = (
    "attention", "group_norm", "layer_norm", "geglu", "guided_step", "int8_linear", "int8_conv", "int8_quantize",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGE = 2**31
ANY_IMPL = "any"


@dataclass(frozen=True)
class Check:
    """One implementation on one workload."""

    op: str
    workload: str
    dtype: str
    impl: str
    share: float | None  # of the error that is allowed; at most 1 is right
    problem: str | None  # why there is no share, or what else is wrong

    @property
    def right(self) -> bool:
        """By the accuracy rule."""
        return self.problem is None and self.share is not None and self.share <= 1


def changed(workload: Workload, name: str, change: Callable[[Arguments], Arguments]) -> Workload:
    """The workload with other arguments."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        return change(workload.make(dtype, device))

    return replace(workload, name=name, make=make)


def scaled(name: str, factor: float, offset: float) -> Callable[[Arguments], Arguments]:
    """A change of one argument's distribution."""
    return lambda arguments: {**arguments, name: arguments[name] * factor + offset}


def to_int8(workload: Workload) -> Workload:
    """The workload with a result that is quantized for the layer after it."""
    written = changed(workload, f"{workload.name} to INT8", lambda arguments: {**arguments, "output_scale": 0.02})
    return replace(written, unquantized={"output_scale": None})


def from_one_projection(arguments: Arguments) -> Arguments:
    """q, k and v as slices of one tensor."""
    q, k, v = torch.stack([arguments[name] for name in ("q", "k", "v")], 2).unbind(2)
    return {"q": q, "k": k, "v": v}


def odd_workloads(dtype: torch.dtype) -> Iterator[Workload]:
    """Small ones that go wrong first."""
    for name, *sizes in (
        ("keys end inside a block", 2, 130, 130, 2, 40), ("two texts, head_dim 80", 1, 70, 154, 1, 80),
        ("one text, head_dim 160", 1, 20, 77, 1, 160),
        ("head_dim 8", 1, 20, 20, 3, 8), ("head_dim 33", 1, 20, 20, 1, 33), ("head_dim 96", 1, 200, 200, 2, 96),
        ("head_dim 128", 1, 200, 256, 2, 128), ("head_dim 256", 1, 200, 130, 1, 256), ("one key", 1, 1, 1, 1, 64),
    ):  # fmt: skip
        yield attention_of_size(name, dtype, *sizes)
    qkv = attention_of_size("", dtype, 2, 300, 300, 4, 64)
    yield changed(qkv, "slices of one projection", from_one_projection)
    yield changed(qkv, "large scores", scaled("q", 12, 0))
    for last in (False, True):
        layout = "channels_last" if last else "NCHW"
        yield group_norm_of_size(f"odd channels {layout}", dtype, (2, 15, 5, 3), 5, last, True)
        yield group_norm_of_size(f"one pixel {layout}", dtype, (2, 6, 1, 1), 3, last, True)
        yield group_norm_of_size(f"chunks end inside {layout}", dtype, (2, 70, 93, 91), 7, last, False)
        yield to_int8(group_norm_of_size(f"chunks end inside {layout}", dtype, (2, 70, 93, 91), 7, last, True))
        plain = group_norm_of_size("", dtype, (1, 64, 80, 80), 4, last, False)
        yield changed(plain, f"a mean of 300 standard deviations {layout}", scaled("x", 1, 300))
    for width in (7, 320, 5000, 16384):
        yield layer_norm_of_size(f"width {width}", dtype, (2, 9), width, True)
        yield to_int8(layer_norm_of_size(f"width {width}", dtype, (2, 9), width, True))
    plain = layer_norm_of_size("", dtype, (2, 9), 640, False)
    yield changed(plain, "a mean of 300 standard deviations", scaled("x", 1, 300))
    yield geglu_of_size("odd width", dtype, (2, 7), 321)
    yield to_int8(geglu_of_size("odd width", dtype, (2, 7), 321))
    yield changed(geglu_of_size("", dtype, (2, 7), 512), "gates far out", scaled("x", 8, 0))
    for rescale in (0.0, 0.7):
        yield guided_step_of_size(f"blocks end inside, rescale {rescale}", dtype, (3, 4, 24, 17), rescale)
    yield from odd_int8_workloads(dtype)


def odd_int8_workloads(dtype: torch.dtype) -> Iterator[Workload]:
    """Of layers in INT8."""
    for quantized in (False, True):
        again = " to INT8" * quantized
        for name, rows, out_features, in_features in (
            ("odd sizes", (2, 35), 19, 37), ("one row", (1, 1), 1280, 320), ("one number", (1, 3), 1, 1),
            ("blocks end inside", (3, 70), 200, 336), ("sums past 2^24", (1, 40), 48, 11_520),
        ):  # fmt: skip
            yield int8_linear_of_size(name + again, dtype, rows, out_features, in_features, True, quantized)
        for name, shape, out_channels, kernel, stride, padding in (
            ("odd sizes", (2, 21, 9, 7), 19, 3, 1, 1), ("4 channels", (1, 4, 16, 16), 320, 3, 1, 1),
            ("to 4 channels", (1, 320, 16, 16), 4, 3, 1, 1), ("stride 2, odd sides", (2, 64, 15, 17), 80, 3, 2, 1),
            ("one pixel", (2, 48, 1, 1), 64, 3, 1, 1), ("1x1", (2, 336, 9, 9), 144, 1, 1, 0),
            ("sums past 2^24", (1, 1280, 8, 8), 64, 3, 1, 1),
        ):  # fmt: skip
            yield int8_conv_of_size(name + again, dtype, shape, out_channels, kernel, stride, padding, True, quantized)
    for smooth in (False, True):
        factors = " with factors" * smooth
        yield int8_quantize_of_size(f"rows{factors}", dtype, (3, 35, 77), smooth)
        yield int8_quantize_of_size(f"images{factors}", dtype, (2, 35, 9, 7), smooth)


def large_workloads() -> Iterator[tuple[Workload, tuple[str, ...]]]:
    """Tensors past what a 32-bit offset reaches, and which of their arguments have a batch."""
    half = torch.float16
    yield group_norm_of_size("2^31 values", half, (17, 128, 1024, 1024), 32, False, True), ("x", "shift")
    yield group_norm_of_size("2^31 values, channels_last", half, (17, 128, 1024, 1024), 32, True, True), ("x", "shift")
    yield layer_norm_of_size("2^31 values", half, (3300, 1024), 640, True), ("x", "residual")
    yield geglu_of_size("2^31 values", half, (420, 1024), 2560), ("x",)
    yield int8_linear_of_size("2^31 values", half, (210, 4096), 64, 2560, False), ("x",)
    yield int8_conv_of_size("2^31 values", half, (66, 512, 256, 256), 64, 3, 1, 1, False), ("x",)
    yield int8_quantize_of_size("2^31 values", half, (840, 1024, 2560), False), ("x",)
    yield attention_of_size("2^31 values", half, 1030, 4096, 77, 8, 64), ("q", "k", "v")


def compile_kernels(workloads: Iterable[Workload], device: torch.device) -> None:
    """Launches every workload's Triton kernels once, many workloads at a time: one by one they take minutes to compile.

    Nothing else is to run meanwhile: results would take memory that was poisoned for others. Errors are left to
    ``check``, and so is the CPU, where nothing is compiled.
    """
    if device.type == "cpu":
        return

    @torch.no_grad()
    def launch(workload: Workload) -> None:
        with suppress(Exception):
            workload.run(workload.make(workload.dtype, device), "triton")

    workers = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for workload in workloads:
            pool.submit(launch, workload)


@torch.no_grad()
def check(workload: Workload, device: torch.device) -> Iterator[Check]:
    """Every implementation that there is."""
    problem = None
    try:
        arguments = workload.arguments(device)
        expected = Expected.of(workload, arguments)
    except Exception as error:  # out of memory, most likely
        problem = _named(error)
    if problem is not None:
        yield Check(workload.op, workload.name, str(workload.dtype), ANY_IMPL, None, problem)
        return
    for impl in (*OURS, *workload.libraries):
        share, problem = None, None
        try:
            expected.poison()
            share = expected.share(workload.run(arguments, impl))
        except ValueError as error:
            if impl != "triton":
                continue  # the op has no such implementation, or it was not built
            problem = str(error)
        except Exception as error:  # whatever it is belongs in the report, and the others are checked still
            problem = _named(error)
        yield Check(workload.op, workload.name, str(workload.dtype), impl, share, problem)


@torch.no_grad()
def check_large(workload: Workload, batched: tuple[str, ...], device: torch.device) -> Iterator[Check]:
    """That the last image's result is, to the bit, what it is alone."""
    problem = None
    try:
        arguments = workload.arguments(device)
        last: dict[str, Any] = {
            name: value[-1:].clone(memory_format=torch.preserve_format) if name in batched else value
            for name, value in arguments.items()
        }
        assert arguments[batched[0]].numel() > LARGE
    except Exception as error:
        problem = _named(error)
    if problem is not None:
        yield Check(workload.op, workload.name, str(workload.dtype), ANY_IMPL, None, problem)
        return
    for impl in (*OURS, *workload.libraries):
        try:
            alone = workload.run(last, impl)
            together = workload.run(arguments, impl)
            same = all(torch.equal(one, many[-1:]) for one, many in zip(alone, together, strict=True))
            problem = None if same else "the last image differs from itself alone"
        except ValueError as error:
            if impl != "triton":
                continue
            problem = str(error)
        except Exception as error:
            problem = _named(error)
        yield Check(workload.op, workload.name, str(workload.dtype), impl, None if problem else 0.0, problem)


def checks(device: torch.device, *, odd_only: bool) -> Iterator[Check]:
    """All of them: of float16 the odd and small ones, the models' and the large ones, then the other dtypes."""
    half, *others = DTYPES
    yield from check_all(odd_workloads(half), device)
    if not odd_only:
        yield from check_all(model_workloads(half), device)
        for workload, batched in large_workloads():
            yield from check_large(workload, batched, device)
    for dtype in others:
        yield from check_all(odd_workloads(dtype), device)
    if not odd_only:
        for dtype in others:
            yield from check_all(model_workloads(dtype), device)


def model_workloads(dtype: torch.dtype) -> Iterator[Workload]:
    """What SD1.5 and SDXL ask for."""
    for op in OPS:
        yield from import_module(f"catimage_accel.kernels.{op}.workload").workloads(2, dtype)


def check_all(workloads: Iterable[Workload], device: torch.device) -> Iterator[Check]:
    """Compiled together, then one after the other."""
    found = list(workloads)
    compile_kernels(found, device)
    for workload in found:
        yield from check(workload, device)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
