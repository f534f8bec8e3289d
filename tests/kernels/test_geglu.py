"""``geglu``: the Triton kernel (in the interpreter) and the reference against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import geglu

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]


def formula(x: Tensor) -> Tensor:
    value, gate = x.double().tensor_split(2, -1)
    return value * gate / 2 * (1 + torch.erf(gate / 2**0.5))


def torchs(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        pytest.param((2, 6, 512), 1.0, id="one block of columns"),
        pytest.param((1, 7, 640), 1.0, id="rows and columns end inside a block"),
        pytest.param((1, 5, 512), 8.0, id="gates far out: erf is 1 or -1 to the last bit"),
        pytest.param((3, 2), 1.0, id="one column"),
        pytest.param((10,), 1.0, id="one row, 1D"),
        pytest.param((2, 1, 3, 34), 1.0, id="4D, odd width"),
        pytest.param((0, 4, 16), 1.0, id="empty batch"),
        pytest.param((2, 0, 16), 1.0, id="no rows"),
    ],
)
def test_accuracy(shape: tuple[int, ...], scale: float, dtype: torch.dtype, assert_accurate: Any) -> None:
    x = inputs(shape, dtype, scale)
    for impl in ("triton", "reference", None):
        assert_accurate(geglu(x, impl=impl), torchs(x), formula(x))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(DTYPES), st.floats(0.1, 10))
def test_any_shape(rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    x = inputs((rows, 2 * width), dtype, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(geglu(x, impl="triton").double(), formula(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [pytest.param(3, id="value"), pytest.param(13, id="gate")])
def test_poison_stays_in_its_column(column: int, poison: float) -> None:
    x = inputs((4, 20))
    x[2, column] = poison
    ours = geglu(x, impl="triton")
    torch.testing.assert_close(ours, torchs(x), equal_nan=True)
    assert (~ours.isfinite()).nonzero().tolist() in ([[2, 3]], [])


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2, :], id="every other row"),
        pytest.param(lambda x: x[:, :, 4:12], id="slice of columns"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1), id="expanded batch"),
    ],
)
def test_other_layouts(view: Any, assert_accurate: Any) -> None:
    x = view(inputs((2, 6, 14)))
    assert_accurate(geglu(x, impl="triton"), torchs(x), formula(x))


@pytest.mark.parametrize("impl", ["triton", "reference", None])
def test_gradients_are_torchs(impl: str | None) -> None:
    x = inputs((3, 8)).requires_grad_()
    got, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (geglu(x, impl=impl), torchs(x)))
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_opcheck() -> None:
    x = inputs((2, 5, 12))
    geglu(x, impl="triton")
    op = torch.ops.catimage_accel.geglu.default
    torch.library.opcheck(op, (x,))
    torch.library.opcheck(op, (x.transpose(0, 1),))
    torch.library.opcheck(op, (x[:0],))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    x = inputs((2, 5, 12))
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, impl=impl), torchs(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"x has shape \(2, 7\) .*accepted: a floating-point \(..., 2 \* width\) tensor"),
        ({"x": torch.zeros(2, 0)}, r"x has shape \(2, 0\)"),
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int8)}, r"x has shape .* dtype torch.int8"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64), "impl": "triton"}, r"x has dtype torch.float64; impl 'triton'"),
        ({"impl": "fast"}, r"impl is 'fast'; accepted: "),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geglu(**({"x": torch.zeros(2, 8)} | change))
