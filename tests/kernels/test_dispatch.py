"""What all ops share: choice of the implementation, a machine without triton, tracing, launch configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from catimage_accel.kernels import tuning
from catimage_accel.kernels.dispatch import choose_impl

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from catimage_accel.kernels import attention, geglu, group_norm, guided_step, layer_norm
from catimage_accel.kernels import int8_conv, int8_linear, int8_quantize
x = torch.ones(2, 4, 8, 8)
assert attention(x, x, x).shape == group_norm(x, 2).shape == layer_norm(x).shape == x.shape
assert layer_norm(x, residual=x)[1].shape == x.shape
assert geglu(x).shape == (2, 4, 8, 4)
guided_step(x, x, None, torch.ones(2, 5), guidance_scale=1)
q = int8_quantize(x, 0.5)
assert int8_linear(q, q[0, 0], 0.5, torch.ones(8)).shape == x.shape
assert int8_conv(q, q, 0.5, torch.ones(2)).shape == (2, 2, 1, 1)
try:
    group_norm(x, 2, impl="triton")
except ValueError as error:
    print(error)
"""


def run_without_interpreter(*arguments: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_triton_the_reference_runs() -> None:
    printed = run_without_interpreter("-c", WITHOUT_TRITON)
    assert printed == "impl is 'triton', but triton is not installed: pip install catimage-accel[triton]\n"


def test_torch_compile_sees_the_kernels() -> None:
    pytest.importorskip("triton")
    printed = run_without_interpreter(Path(__file__).with_name("trace_ops.py"))
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"op": "add_layer_norm", "kernels": ["layer_norm_kernel"]},
        {"op": "attention", "kernels": ["attention_kernel"]},
        {"op": "geglu", "kernels": ["geglu_kernel"]},
        {"op": "group_norm", "kernels": ["moments_nchw_kernel", "combine_kernel", "apply_nchw_kernel"]},
        {"op": "guided_step", "kernels": ["moments_kernel", "step_kernel"]},
        {"op": "int8_conv", "kernels": ["int8_conv_kernel"]},
        {"op": "int8_linear", "kernels": ["int8_linear_kernel"]},
        {"op": "int8_quantize", "kernels": ["int8_quantize_kernel"]},
        {"op": "layer_norm", "kernels": ["layer_norm_kernel"]},
    ]


def test_without_the_interpreter_triton_takes_cuda_tensors_only() -> None:
    pytest.importorskip("triton")
    program = (
        "import torch\nfrom catimage_accel.kernels import group_norm\n"
        "try:\n    group_norm(torch.ones(1, 2, 3), 1, impl='triton')\nexcept ValueError as error:\n    print(error)"
    )
    assert run_without_interpreter("-c", program) == "x is on cpu; impl 'triton' accepts CUDA tensors\n"


def test_the_best_implementation_of_a_cpu_tensor_is_torchs() -> None:
    assert choose_impl(None, "x", torch.ones(1)) == "reference"


def test_an_argument_that_needs_a_gradient_counts_only_while_gradients_are_on() -> None:
    pytest.importorskip("triton")
    x, parameter = torch.ones(1), torch.nn.Parameter(torch.ones(1))
    assert choose_impl("triton", "x", x, None, parameter) == "reference"
    with torch.no_grad():
        assert choose_impl("triton", "x", x, None, parameter) == "triton"


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_launch_configs_are_whole(path: Path) -> None:
    """Every entry has the same names, so that any of them can be the nearest."""
    entries = json.loads(path.read_text())
    assert len({tuple(entry["shape"]) for entry in entries}) == 1
    assert all(value > 0 for entry in entries for part in ("shape", "config") for value in entry[part].values())


def test_the_nearest_launch_config_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"shape": {"pixels": pixels, "width": 8}, "config": {"BLOCK": pixels}} for pixels in (64, 4096)]
    (tmp_path / "op.default.json").write_text(json.dumps(entries))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    found = [tuning.launch_config("op", torch.device("cpu"), pixels=p, width=3)["BLOCK"] for p in (1, 500, 600, 10**9)]
    assert found == [64, 64, 4096, 4096]
