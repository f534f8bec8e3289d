"""Which calls the CUDA kernels get: those on which they were measured to be the fastest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_group_norm import channels_last
from torch import Tensor

from catimage_accel.kernels import attention, cuda, dispatch, tuning
from catimage_accel.kernels.dispatch import KERNEL_DTYPES, choose_impl
from catimage_accel.kernels.group_norm.layout import tuned_shape
from catimage_accel.kernels.tuning.impl import measured_impl


class OnCuda(Tensor):
    """A tensor on the CPU that says it is on a CUDA device."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def on_cuda(*shape: int) -> Tensor:
    return torch.ones(shape).as_subclass(OnCuda)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the op's file of the device "chip", which every device is; cuda is built."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "device_slug", lambda device: "chip")
    monkeypatch.setattr(cuda, "BUILT", True)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    tuning.forget()

    def write(op: str, *entries: tuple[dict[str, int], str | None]) -> None:
        content = [
            {"shape": shape, "config": {"BLOCK": 1}, **({} if impl is None else {"impl": impl})}
            for shape, impl in entries
        ]
        (tmp_path / f"{op}.chip.json").write_text(json.dumps(content))
        tuning.forget()

    yield write
    tuning.forget()


def pixels(number: int, channels_last: int = 1) -> dict[str, int]:
    return {"channels_last": channels_last, "pixels": number}


def chosen(x: Tensor, impl: str | None = None, weight: Tensor | None = None) -> str:
    return choose_impl(
        impl, "x", x, weight, cuda_dtypes=KERNEL_DTYPES,
        measured=lambda: measured_impl("group_norm", x.device, **tuned_shape(x)),
    )  # fmt: skip


def test_cuda_is_chosen_only_where_it_was_measured_faster(measured: Any) -> None:
    assert chosen(on_cuda(1, 2, 64, 64)) == "triton"  # nothing was measured
    measured("group_norm", (pixels(64), "triton"), (pixels(4096), "cuda"), (pixels(4096, channels_last=2), None))
    sides = (2, 8, 20, 30, 64, 500)
    assert [chosen(on_cuda(1, 2, side, side)) for side in sides] == ["triton"] * 3 + ["cuda"] * 3
    assert chosen(channels_last(on_cuda(1, 2, 64, 64))) == "triton"  # a config, but no choice
    assert chosen(on_cuda(1, 2, 0, 64)) == "triton"
    assert chosen(on_cuda(1, 2, 64, 64), "cuda") == chosen(on_cuda(1, 2, 4, 4), "cuda") == "cuda"
    assert chosen(on_cuda(1, 2, 64, 64).double()) == "reference"
    assert choose_impl(None, "x", on_cuda(1, 2, 64, 64)) == "triton"  # not an op with CUDA kernels


def test_a_gradient_takes_the_reference(measured: Any) -> None:
    measured("group_norm", (pixels(4096), "cuda"))
    for impl in ("cuda", None):
        weight = torch.nn.Parameter(torch.ones(2))
        assert chosen(on_cuda(1, 2, 64, 64), impl, weight) == "reference"


def test_torch_compile_sees_through_the_choice(measured: Any) -> None:
    measured("group_norm", (pixels(64), "triton"), (pixels(4096), "cuda"))

    def call(x: Tensor) -> Tensor:
        return x + 5 if measured_impl("group_norm", x.device, **tuned_shape(x)) == "cuda" else x - 5

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for side in (4, 8, 20, 40, 64, 100):
        assert torch.equal(compiled(torch.ones(2, 3, side, side)), call(torch.ones(2, 3, side, side)))


def test_attention_goes_by_head_dim_then_keys_then_queries(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(head_dim: int, keys: int, queries: int) -> dict[str, int]:
        return {"itemsize": 2, "head_dim": head_dim, "keys": keys, "queries": queries}

    measured(
        "attention", (sizes(40, 77, 4096), "cuda"), (sizes(40, 4096, 4096), "triton"), (sizes(160, 77, 64), "triton"),
        (sizes(160, 77, 256), "cuda"),
    )  # fmt: skip
    ran = []
    for impl in ("cuda", "triton"):
        module = ModuleType(f"catimage_accel.kernels.attention.{impl}")
        module.attention = lambda *tensors, scale, impl=impl: ran.append(impl)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules[attention.__module__], impl, module, raising=False)
    for head_dim, keys, queries in ((40, 77, 64), (40, 1000, 64), (160, 154, 100), (160, 77, 1024), (48, 77, 4096)):
        attention(*(on_cuda(1, n, 2, head_dim).half() for n in (queries, keys, keys)))
    assert ran == ["cuda", "triton", "triton", "cuda", "triton"]
