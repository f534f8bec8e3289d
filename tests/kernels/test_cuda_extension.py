"""The library of CUDA kernels: built and loaded without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from catimage_accel.kernels import attention, cuda, group_norm
from catimage_accel.kernels.build import CUDA
from catimage_accel.kernels.dispatch import choose_impl

needs_nvcc = pytest.mark.skipif(CUDA.why_not() is not None, reason=f"the CUDA kernels: {CUDA.why_not()}")
KERNELS = 3 * 2 * 3 + 1  # of group_norm: one_pass, moments and apply for three dtypes and two memory formats; combine
ATTENTION_KERNELS = 2 * 7  # two dtypes, four head_dims, all but one with stages of two sizes

# Loads the library beside a PyTorch without CUDA, then sends tensors without data through the op.
FAKES = """
import sys
from pathlib import Path
import catimage_accel.kernels.cuda as cuda
from catimage_accel.kernels.build import CUDA
CUDA.path, cuda.BUILT = Path(sys.argv[1]), True
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from catimage_accel.kernels import attention, group_norm

def call(x):
    return group_norm(x, 4, activation="silu", impl="cuda")

with FakeTensorMode():
    x = torch.empty(2, 8, 5, 6, device="cuda", dtype=torch.bfloat16)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        y = torch.compile(call, fullgraph=True, backend="eager")(view)
        print(y.dtype, y.device.type, tuple(y.shape), y.stride())
    print(*(node.target for node in make_fx(call)(x).graph.nodes if node.op == "call_function"))
    q, k = (torch.empty(n, 2, 3, 40, device="cuda", dtype=torch.float16).transpose(0, 1) for n in (5, 7))
    y = torch.compile(attention, fullgraph=True, backend="eager")(q, k, k, impl="cuda")
    print(y.dtype, y.device.type, tuple(y.shape), y.stride())
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
        pytest.param(CUDA.architectures, id="all", marks=pytest.mark.slow),
    ],
)
def test_builds_without_spills_and_loads_without_a_gpu(
    architectures: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "kernels.so"
    monkeypatch.setattr(CUDA, "architectures", architectures)
    said = CUDA.compile(library)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    chips = sum("code=sm" in name for name in architectures)
    assert spills == [("0", "0", "0")] * (KERNELS + ATTENTION_KERNELS) * chips
    registers = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", said, re.DOTALL)
    attention_registers = [int(number) for name, number in registers if "attention_kernel" in name]
    others = [int(number) for name, number in registers if "attention_kernel" not in name]
    assert (len(others), len(attention_registers)) == (KERNELS * chips, ATTENTION_KERNELS * chips)
    assert max(others) <= 128  # what leaves room for blocks of 512 threads
    assert max(attention_registers) <= 255  # for two blocks of 128
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]
    assert not CUDA.is_stale(library)

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
        "torch.float16 cuda (2, 5, 3, 40) (600, 120, 40, 1)",
        "x is on cpu; impl 'cuda' accepts CUDA tensors",
    ]


@needs_nvcc
def test_what_does_not_compile_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA, "architectures", ["arch=compute_1,code=sm_1"])
    with pytest.raises(RuntimeError, match=r"(?s)nvcc failed:.*compute_1"):
        CUDA.compile(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (48, torch.float16, "q has head_dim 48; impl 'cuda' accepts 40, 64, 80, 160"),
        (40, torch.float32, r"q has dtype torch.float32; impl 'cuda' accepts torch.float16, torch.bfloat16"),
        (40, torch.float16, "q is on cpu; impl 'cuda' accepts CUDA tensors"),
    ],
)
def test_what_cuda_attention_cannot_do(
    head_dim: int, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "BUILT", True)
    q = torch.ones(1, 4, 2, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, impl="cuda")


def test_an_op_without_cuda_kernels_does_not_take_cuda() -> None:
    with pytest.raises(ValueError, match="impl is 'cuda'; accepted: 'reference', 'triton' or None"):
        choose_impl("cuda", "x", torch.ones(1))
