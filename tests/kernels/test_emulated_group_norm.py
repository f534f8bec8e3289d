"""The CUDA kernels of ``group_norm``, their source run on the CPU, against the formula in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation import compile_emulation
from test_group_norm import SHAPES, channels_last, formula, inputs, torchs
from torch import Tensor

from catimage_accel.kernels.build import CUDA

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MARGIN = 64  # NaN around x and y: what is read beyond x shows, and so does what is written beyond y
EMPTY = ("empty batch", "no pixels")  # nothing is launched
HOPPER, AMPERE = 8, 1  # blocks that can share memory

pytestmark = pytest.mark.skipif(CUDA.find_compiler() is None, reason="nvcc was not found")


@dataclass(frozen=True)
class Run:
    """A result, and the plan that made it."""

    y: Tensor
    one_pass: bool
    aligned: bool
    slices: int
    pieces: int


Emulate = Callable[..., Run]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    call = compile_emulation("group_norm", tmp_path_factory.mktemp("emulated")).emulate_group_norm
    call.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    call.argtypes = [
        number, *[pointer] * 5, ctypes.c_int64, number, ctypes.c_int64, number, ctypes.c_bool, ctypes.c_float,
        ctypes.c_bool, number, number, pointer,
    ]  # fmt: skip

    def run(
        x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
        activation: str | None = None, shift: Tensor | None = None, *, max_cluster: int = HOPPER, order: int = 1,
        misaligned: bool = False,
    ) -> Run:  # fmt: skip
        batch, channels = x.shape[:2]
        last = not x.is_contiguous()
        memory = x.movedim(1, -1) if last else x
        x_at, y_at = (torch.full((x.numel() + 2 * MARGIN,), float("nan"), dtype=x.dtype) for _ in range(2))
        inside = slice(MARGIN - misaligned, MARGIN - misaligned + x.numel())
        x_at[inside] = memory.reshape(-1)
        chosen = (ctypes.c_int * 4)()
        pointers = [
            x_at[inside].data_ptr(), *(t if t is None else t.data_ptr() for t in (shift, weight, bias)),
            y_at[inside].data_ptr(),
        ]  # fmt: skip
        failure = call(
            DTYPES.index(x.dtype), *pointers, batch, channels, x.numel() // (batch * channels), groups, last, eps,
            activation == "silu", max_cluster, order, chosen,
        )  # fmt: skip
        assert failure is None, failure
        y = y_at[inside].reshape(memory.shape)
        y_at = y_at.clone()
        y_at[inside] = float("nan")
        assert y_at.isnan().all()
        return Run(y.movedim(-1, 1) if last else y, bool(chosen[0]), bool(chosen[1]), chosen[2], chosen[3])

    return run


@pytest.mark.parametrize("max_cluster", [HOPPER, AMPERE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NC", "channels last"])
@pytest.mark.parametrize(("shape", "groups", "offset"), [case for case in SHAPES if case.id not in EMPTY])
def test_accuracy(
    shape: tuple[int, ...], groups: int, offset: float, layout: str, dtype: torch.dtype, max_cluster: int,
    emulate: Emulate, assert_accurate: Any,
) -> None:  # fmt: skip
    x, weight, bias = inputs(shape, dtype, offset)
    x = channels_last(x) if layout == "channels last" else x
    for activation in (None, "silu"):
        arguments = (x, groups, weight, bias, 1e-5, activation)
        ours = emulate(*arguments, max_cluster=max_cluster)
        assert_accurate(ours.y, torchs(*arguments), formula(*arguments))


LAST, DENSE = "channels last", "NC"
PATHS = [
    pytest.param((2, 64, 20, 20), 4, DENSE, HOPPER, (True, True, 2, 1), id="a cluster holds a group"),
    pytest.param((2, 80, 13, 32), 8, LAST, HOPPER, (True, True, 4, 1), id="a cluster holds a bundle of groups"),
    pytest.param((1, 80, 13, 4), 8, LAST, AMPERE, (True, True, 1, 1), id="a block holds a bundle of groups"),
    pytest.param((1, 4, 90, 90), 1, DENSE, AMPERE, (False, True, 8, 1), id="a group larger than a block"),
    pytest.param((2, 40, 40, 40), 8, LAST, AMPERE, (False, True, 16, 1), id="a bundle larger than a block"),
    pytest.param((2, 5000, 3), 1, LAST, HOPPER, (False, True, 1, 3), id="a group cut into pieces"),
    pytest.param((2, 5001, 3), 1, LAST, HOPPER, (False, False, 1, 3), id="a group cut into pieces, unaligned"),
    pytest.param((1, 6, 59, 59), 1, DENSE, AMPERE, (False, False, 6, 1), id="a large group, unaligned"),
    pytest.param((1, 64, 1100), 64, LAST, AMPERE, (False, True, 18, 1), id="more groups than a block has warps"),
]


@pytest.mark.parametrize(("shape", "groups", "layout", "max_cluster", "plan"), PATHS)
def test_every_path(
    shape: tuple[int, ...], groups: int, layout: str, max_cluster: int, plan: tuple[Any, ...], emulate: Emulate,
    assert_accurate: Any,
) -> None:  # fmt: skip
    """With a shift; in whatever order the threads run; for an image alone and in a batch; unaligned."""
    x, weight, bias = inputs(shape)
    shift = 3 * torch.randn(shape[:2], generator=torch.Generator().manual_seed(1))
    x = channels_last(x) if layout == LAST else x
    arguments = (x, groups, weight, bias, 1e-5, "silu", shift)
    ours = emulate(*arguments, max_cluster=max_cluster)
    assert (ours.one_pass, ours.aligned, ours.slices, ours.pieces) == plan
    torchs_result, exact = torchs(*arguments), formula(*arguments)
    assert_accurate(ours.y, torchs_result, exact)
    assert torch.equal(emulate(*arguments, max_cluster=max_cluster, order=-1).y, ours.y)
    alone = emulate(x[-1:], groups, weight, bias, 1e-5, "silu", shift[-1:], max_cluster=max_cluster)
    assert torch.equal(alone.y, ours.y[-1:])
    unaligned = emulate(*arguments, max_cluster=max_cluster, misaligned=True)
    assert not unaligned.aligned
    assert_accurate(unaligned.y, torchs_result, exact)


@pytest.mark.parametrize("max_cluster", [HOPPER, AMPERE])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [DENSE, LAST])
def test_poison_stays_in_its_group(layout: str, poison: float, max_cluster: int, emulate: Emulate) -> None:
    x, weight, bias = inputs((2, 8, 80, 80))
    x = channels_last(x) if layout == LAST else x
    clean = emulate(x, 4, weight, bias, activation="silu", max_cluster=max_cluster).y.clone()
    x[1, 3, 2, 2] = poison
    ours = emulate(x, 4, weight, bias, activation="silu", max_cluster=max_cluster).y
    assert ours[1, 2:4].isnan().all()
    clean[1, 2:4] = ours[1, 2:4] = 0
    assert torch.equal(ours, clean)


@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("layout", [DENSE, LAST])
def test_equal_values_leave_the_bias(value: float, layout: str, emulate: Emulate) -> None:
    x, weight, bias = inputs((1, 8, 60, 60))
    x = torch.full_like(x, value)
    ours = emulate(channels_last(x) if layout == LAST else x, 2, weight, bias).y
    torch.testing.assert_close(ours, bias.reshape(1, 8, 1, 1).expand_as(ours), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [DENSE, LAST])
def test_values_whose_squares_overflow_leave_the_bias(layout: str, emulate: Emulate) -> None:
    """As in torch's own op: the variance is infinite, the mean is not."""
    x, weight, bias = inputs((1, 8, 60, 60))
    x = 1e30 * (x.abs() + 1)
    ours = emulate(channels_last(x) if layout == LAST else x, 2, weight, bias).y
    assert torch.equal(ours, bias.reshape(1, 8, 1, 1).expand_as(ours))


@pytest.mark.parametrize("layout", [DENSE, LAST])
@pytest.mark.parametrize("max_cluster", [HOPPER, AMPERE])
def test_an_outlier_does_not_drown_the_rest(layout: str, max_cluster: int, emulate: Emulate) -> None:
    x, *_ = inputs((1, 8, 80, 80))
    x[0, :, 0, 0] = 1e5
    x = channels_last(x) if layout == LAST else x
    ours = emulate(x, 2, max_cluster=max_cluster).y
    torch.testing.assert_close(ours.double(), formula(x, 2), atol=1e-8, rtol=1e-6)
