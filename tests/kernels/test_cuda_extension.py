"""The library of CUDA kernels: built and loaded without a GPU, chosen by dispatch, and run where there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_group_norm import SHAPES, channels_last, formula, inputs, torchs
from torch import Tensor

from catimage_accel.kernels import cuda, dispatch, group_norm, tuning
from catimage_accel.kernels.cuda import build
from catimage_accel.kernels.dispatch import choose_impl
from catimage_accel.kernels.tuning import impl as tuned_impl

needs_nvcc = pytest.mark.skipif(build.why_not() is not None, reason=f"the CUDA kernels: {build.why_not()}")
KERNELS = 3 * 2 * 3 + 1  # one_pass, moments and apply for three dtypes and two memory formats; combine

# Loads the library beside a PyTorch without CUDA, then sends tensors without data through the op.
FAKES = """
import sys
from pathlib import Path
import catimage_accel.kernels.cuda as cuda
cuda.LIBRARY, cuda.BUILT = Path(sys.argv[1]), True
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from catimage_accel.kernels import group_norm

def call(x):
    return group_norm(x, 4, activation="silu", impl="cuda")

with FakeTensorMode():
    x = torch.empty(2, 8, 5, 6, device="cuda", dtype=torch.bfloat16)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        y = torch.compile(call, fullgraph=True, backend="eager")(view)
        print(y.dtype, y.device.type, tuple(y.shape), y.stride())
    print(*(node.target for node in make_fx(call)(x).graph.nodes if node.op == "call_function"))
try:
    call(torch.ones(2, 8, 5, 6))
except ValueError as error:
    print(error)
"""


@needs_nvcc
@pytest.mark.parametrize(
    "architectures",
    [
        pytest.param(("arch=compute_90a,code=sm_90a",), id="sm_90a"),
        pytest.param(build.ARCHITECTURES, id="all", marks=pytest.mark.slow),
    ],
)
def test_builds_without_spills_and_loads_without_a_gpu(architectures: tuple[str, ...], tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    said = build.compile_library(library, architectures)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    chips = sum("code=sm" in name for name in architectures)
    assert spills == [("0", "0", "0")] * KERNELS * chips
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == KERNELS * chips
    assert max(registers) <= 128  # what leaves room for blocks of 512 threads
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]
    assert not build.is_stale(library)

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", FAKES, library], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "torch.bfloat16 cuda (2, 8, 5, 6) (240, 30, 6, 1)",
        "torch.bfloat16 cuda (2, 8, 5, 6) (240, 1, 48, 8)",
        "torch.bfloat16 cuda (2, 8, 6, 5) (240, 30, 5, 1)",
        "catimage_accel_cuda.group_norm.default",
        "x is on cpu; impl 'cuda' accepts CUDA tensors",
    ]


@needs_nvcc
def test_what_does_not_compile_leaves_no_library(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)nvcc failed:.*compute_1"):
        build.compile_library(tmp_path / "kernels.so", ["arch=compute_1,code=sm_1"])
    assert list(tmp_path.iterdir()) == []


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.why_not() == "nvcc was not found"
    monkeypatch.setattr(build, "find_nvcc", lambda: tmp_path)
    monkeypatch.setattr(build, "find_torch", lambda: tmp_path)
    assert build.why_not() == f"the PyTorch in {tmp_path} has no headers of the stable ABI"
    monkeypatch.setattr(build, "find_torch", lambda: None)
    assert str(build.why_not()).startswith("PyTorch is not installed where this is built; once it is: python -m")
    with pytest.raises(RuntimeError, match="the CUDA kernels cannot be built: PyTorch is not installed"):
        build.compile_library(tmp_path / "kernels.so")


@pytest.mark.parametrize(
    ("built", "dtype", "message"),
    [
        (False, torch.float32, "impl is 'cuda', but its kernels are not built: python -m catimage_accel.kernels.cuda"),
        (True, torch.float64, r"x has dtype torch.float64; impl 'cuda' accepts torch.float16, torch.bfloat16"),
        (True, torch.float32, "x is on cpu; impl 'cuda' accepts CUDA tensors"),
    ],
)
def test_what_cuda_cannot_do(built: bool, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BUILT", built)
    with pytest.raises(ValueError, match=message):
        group_norm(torch.ones(1, 4, 2, dtype=dtype), 2, impl="cuda")


def test_an_op_without_cuda_kernels_does_not_take_cuda() -> None:
    with pytest.raises(ValueError, match="impl is 'cuda'; accepted: 'reference', 'triton' or None"):
        choose_impl("cuda", "x", torch.ones(1))


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

    def write(*entries: tuple[int, int, str | None]) -> None:
        content = [
            {
                "shape": {"channels_last": last, "pixels": pixels},
                "config": {"BLOCK": 1},
                **({} if impl is None else {"impl": impl}),
            }
            for last, pixels, impl in entries
        ]
        (tmp_path / "group_norm.chip.json").write_text(json.dumps(content))

    yield write
    tuning.forget()


def test_cuda_is_chosen_only_where_it_was_measured_faster(measured: Any) -> None:
    def chosen(x: Tensor, impl: str | None = None) -> str:
        return choose_impl(impl, "x", x, op="group_norm")

    assert chosen(on_cuda(1, 2, 64, 64)) == "triton"  # nothing was measured
    measured((1, 64, "triton"), (1, 4096, "cuda"), (2, 4096, None))
    tuning.forget()
    sides = (2, 8, 20, 30, 64, 500)
    assert [chosen(on_cuda(1, 2, side, side)) for side in sides] == ["triton"] * 3 + ["cuda"] * 3
    assert chosen(channels_last(on_cuda(1, 2, 64, 64))) == "triton"  # a config, but no choice
    assert chosen(on_cuda(1, 2, 0, 64)) == "triton"
    assert chosen(on_cuda(1, 2, 64, 64), "cuda") == chosen(on_cuda(1, 2, 4, 4), "cuda") == "cuda"
    assert chosen(on_cuda(1, 2, 64, 64).double()) == "reference"
    assert choose_impl(None, "x", on_cuda(1, 2, 64, 64)) == "triton"  # not an op with CUDA kernels


def test_a_gradient_takes_the_reference(measured: Any) -> None:
    measured((1, 4096, "cuda"))
    for impl in ("cuda", None):
        weight = torch.nn.Parameter(torch.ones(2))
        assert choose_impl(impl, "x", on_cuda(1, 2, 64, 64), weight, op="group_norm") == "reference"


def test_torch_compile_sees_through_the_choice(measured: Any) -> None:
    measured((1, 64, "triton"), (1, 4096, "cuda"))

    def call(x: Tensor) -> Tensor:
        return x + 5 if tuned_impl.measured_impl("group_norm", x) == "cuda" else x - 5

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for side in (4, 8, 20, 40, 64, 100):
        assert torch.equal(compiled(torch.ones(2, 3, side, side)), call(torch.ones(2, 3, side, side)))


LARGE = [
    pytest.param((2, 320, 64, 64), 32, 0.0, id="a cluster of blocks"),
    pytest.param((1, 64, 256, 256), 2, 100.0, id="groups larger than a cluster"),
    pytest.param((1, 20000, 3), 1, 0.0, id="a group of more channels than a block has threads for"),
    pytest.param((1, 2560, 32, 33), 32, 0.0, id="channels of odd length"),
]
IMPLS = [
    pytest.param("cuda", marks=pytest.mark.skipif(not cuda.BUILT, reason=f"not built: {cuda.HOW_TO_BUILD}")),
    pytest.param("triton", marks=pytest.mark.skipif(dispatch.TRITON_INTERPRETS, reason="TRITON_INTERPRET is set")),
]
on_devices = pytest.mark.parametrize("impl", IMPLS)
in_layouts = pytest.mark.parametrize("layout", ["NC", "channels last"])


def to_device(layout: str, *tensors: Tensor) -> list[Tensor]:
    x, *rest = (tensor.cuda() for tensor in tensors)
    return [channels_last(x) if layout == "channels last" else x, *rest]


@pytest.mark.gpu
@on_devices
@in_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups", "offset"), SHAPES + LARGE)
def test_accuracy_on_a_device(
    shape: tuple[int, ...], groups: int, offset: float, dtype: torch.dtype, layout: str, impl: str, assert_accurate: Any
) -> None:
    x, weight, bias = to_device(layout, *inputs(shape, dtype, offset))
    for activation, shift in ((None, None), ("silu", None), ("silu", torch.randn(shape[:2]).to(x))):
        ours = group_norm(x, groups, weight, bias, activation=activation, shift=shift, impl=impl)
        arguments = (x, groups, weight, bias, 1e-5, activation, shift)
        assert_accurate(ours, torchs(*arguments), formula(*arguments))
        assert ours.stride() == x.stride()


@pytest.mark.gpu
@on_devices
@in_layouts
@pytest.mark.parametrize("side", [21, 200])
def test_same_bits_on_a_device_whatever_the_batch(side: int, layout: str, impl: str) -> None:
    x, weight, bias = to_device(layout, *inputs((3, 8, side, side)))
    together = group_norm(x, 2, weight, bias, impl=impl)
    assert torch.equal(together, group_norm(x, 2, weight, bias, impl=impl))
    assert torch.equal(together[1:2], group_norm(x[1:2], 2, weight, bias, impl=impl))


@pytest.mark.gpu
@on_devices
@in_layouts
def test_poison_stays_in_its_group_on_a_device(layout: str, impl: str) -> None:
    x, weight, bias = to_device(layout, *inputs((2, 8, 6, 6)))
    clean = group_norm(x, 4, weight, bias, activation="silu", impl=impl)
    x[1, 3, 2, 2] = float("inf")
    ours = group_norm(x, 4, weight, bias, activation="silu", impl=impl)
    assert ours[1, 2:4].isnan().all()
    clean[1, 2:4] = ours[1, 2:4] = 0
    assert torch.equal(ours, clean)


@pytest.mark.gpu
@on_devices
@in_layouts
@pytest.mark.parametrize("groups", [1, 8])
def test_more_values_than_32_bits_count(groups: int, layout: str, impl: str) -> None:
    """Repeating the pixels of a small image leaves its mean and variance as they are."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("takes 24 GiB of device memory")
    small, repeats = inputs((1, 8, 2**20), torch.float16)[0].cuda(), 257
    x = small.repeat(1, 1, repeats)
    assert x.numel() > 2**31
    x = channels_last(x) if layout == "channels last" else x
    ours = group_norm(x, groups, impl=impl)
    expected = formula(small, groups)
    for part in (0, repeats // 2, repeats - 1):
        got = ours[..., part * 2**20 : (part + 1) * 2**20]
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@on_devices
def test_in_a_cuda_graph_and_compiled(impl: str) -> None:
    x, weight, bias = to_device("NC", *inputs((2, 64, 40, 40), torch.bfloat16))
    expected = group_norm(x, 8, weight, bias, activation="silu", impl=impl)
    compiled = torch.compile(group_norm, fullgraph=True)
    assert torch.equal(compiled(x, 8, weight, bias, activation="silu", impl=impl), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_norm(x, 8, weight, bias, activation="silu", impl=impl)
    x.mul_(-1)
    graph.replay()
    assert torch.equal(captured, group_norm(x, 8, weight, bias, activation="silu", impl=impl))


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.BUILT, reason=f"not built: {cuda.HOW_TO_BUILD}")
def test_opcheck_on_a_device() -> None:
    x, weight, bias = to_device("NC", *inputs((2, 8, 5, 6)))
    group_norm(x, 4, impl="cuda")
    op = torch.ops.catimage_accel_cuda.group_norm.default
    torch.library.opcheck(op, (x, 4, weight, bias, 1e-5, True, None))
    torch.library.opcheck(op, (channels_last(x), 4, None, None, 1e-5, False, torch.randn(8, 2, device="cuda").t()))
    torch.library.opcheck(op, (x.transpose(2, 3)[:0], 4, weight, None, 1e-5, False, None))
