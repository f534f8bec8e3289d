"""What is checked of the kernels on a device, in which order, and what an error does to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import correctness
import pytest
import torch
from correctness import ANY_IMPL, Check, check, check_large, checks, compile_kernels

from catimage_accel.kernels.geglu.workload import of_size
from catimage_accel.kernels.tuning.workload import Workload

CPU = torch.device("cpu")
SMALL = of_size("small", torch.float32, (1, 3), 8)


def test_float16_goes_first_and_the_large_before_further_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def see(workload: Workload, *rest: Any) -> Iterator[Check]:
        kind = "large" if "2^31" in workload.name else "model" if "batch 2" in workload.name else "odd"
        seen.append(f"{kind} {workload.dtype}")
        yield from ()

    monkeypatch.setattr(correctness, "check", see)
    monkeypatch.setattr(correctness, "check_large", see)
    assert not list(checks(CPU, odd_only=False))
    order = [
        "odd torch.float16", "model torch.float16", "large torch.float16", "odd torch.bfloat16", "odd torch.float32",
        "model torch.bfloat16", "model torch.float32",
    ]  # fmt: skip
    assert list(dict.fromkeys(seen)) == order
    assert sorted(seen, key=order.index) == seen
    seen.clear()
    assert not list(checks(CPU, odd_only=True))
    assert set(seen) == {name for name in order if name.startswith("odd")}


def test_kernels_are_compiled_many_at_a_time_and_errors_left_to_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    both, launched = threading.Barrier(2, timeout=20), []

    def launch(impl: str) -> torch.Tensor:
        both.wait()
        launched.append((impl, torch.is_grad_enabled()))
        raise ValueError("no such kernel")

    workload = replace(SMALL, call=launch, make=lambda dtype, device: {})
    compile_kernels([workload, workload], CPU)
    assert not launched
    compile_kernels([workload, workload], torch.device("cuda", 0))
    assert launched == [("triton", False)] * 2


def test_too_large_a_workload_is_told_and_ends_nothing() -> None:
    def too_large(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    told = Check("geglu", "small", "torch.float32", ANY_IMPL, None, "OutOfMemoryError: tried to allocate 9 GiB")
    assert not told.right
    workload = replace(SMALL, make=too_large)
    assert list(check(workload, CPU)) == [told]
    assert list(check_large(workload, ("x",), CPU)) == [told]


def test_a_definition_that_needs_too_much_is_told_too() -> None:
    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    [found] = check(replace(SMALL, call=call), CPU)
    assert (found.impl, found.problem) == (ANY_IMPL, "OutOfMemoryError: tried to allocate 9 GiB")


def test_small_tensors_are_not_taken_for_large_ones() -> None:
    [found] = check_large(SMALL, ("x",), CPU)
    assert not found.right
