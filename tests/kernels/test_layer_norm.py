"""``layer_norm``: the Triton kernel (in the interpreter) and the reference against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import layer_norm
from catimage_accel.kernels.layer_norm import MAX_TRITON_WIDTH

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]


def formula(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = x.double() if residual is None else x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double(), total


def torchs(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = x if residual is None else x + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator)
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return tuple(tensor.to(dtype) for tensor in (x + offset, residual, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        pytest.param((2, 9, 320), 0.0, id="SD1.5 width: rows end inside a block"),
        pytest.param((1, 3, 1280), 0.0, id="a row a block"),
        pytest.param((1, 3, 640), 1000.0, id="a mean of 1000 standard deviations: E[x^2] - E[x]^2 would cancel"),
        pytest.param((1, 1, 5000), 0.0, id="width past SDXL's"),
        pytest.param((5, 7), 0.0, id="odd width"),
        pytest.param((3, 1), 0.0, id="one value a row: the bias is left"),
        pytest.param((12,), 0.0, id="one row, 1D"),
        pytest.param((2, 3, 2, 6), 0.0, id="4D"),
        pytest.param((0, 4, 16), 0.0, id="empty batch"),
        pytest.param((2, 0, 16), 0.0, id="no rows"),
    ],
)
def test_accuracy(shape: tuple[int, ...], offset: float, dtype: torch.dtype, assert_accurate: Any) -> None:
    x, residual, weight, bias = inputs(shape, dtype, offset)
    plain, exact = torchs(x, weight, bias), formula(x, weight, bias)
    sums, exact_sums = torchs(x, weight, bias, residual=residual), formula(x, weight, bias, residual=residual)
    for impl in ("triton", "reference", None):
        assert_accurate(layer_norm(x, weight, bias, impl=impl), plain[0], exact[0])
        both = layer_norm(x, weight, bias, residual=residual, impl=impl)
        for ours, theirs, true in zip(both, sums, exact_sums, strict=True):
            assert_accurate(ours, theirs, true)
        assert torch.equal(both[1], sums[1])


@pytest.mark.parametrize(("with_weight", "with_bias"), [(False, False), (True, False), (False, True)])
def test_optional_affine(with_weight: bool, with_bias: bool, assert_accurate: Any) -> None:
    x, _, weight, bias = inputs((4, 24))
    arguments = (x, weight if with_weight else None, bias if with_bias else None)
    assert_accurate(layer_norm(*arguments, impl="triton"), torchs(*arguments)[0], formula(*arguments)[0])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20), st.integers(2, 600), st.sampled_from(DTYPES), st.sampled_from([1e-6, 1e-5, 1e-2]),
    st.booleans(),
)  # fmt: skip
def test_any_shape(rows: int, width: int, dtype: torch.dtype, eps: float, with_residual: bool) -> None:
    x, residual, weight, bias = inputs((rows, width), dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    if with_residual:
        ours, _ = layer_norm(x, weight, bias, eps, residual=residual, impl="triton")
    else:
        ours = layer_norm(x, weight, bias, eps, impl="triton")
    exact, _ = formula(x, weight, bias, eps, residual if with_residual else None)
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


def test_same_bits_whatever_the_batch() -> None:
    x, residual, weight, bias = inputs((3, 5, 100))
    together, _ = layer_norm(x, weight, bias, residual=residual, impl="triton")
    alone, _ = layer_norm(x[1:2], weight, bias, residual=residual[1:2], impl="triton")
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_stays_in_its_row(poison: float) -> None:
    x, residual, weight, bias = inputs((6, 20))
    residual[2, 3] = poison
    ours, total = layer_norm(x, weight, bias, residual=residual, impl="triton")
    assert ours[2].isnan().all()
    torch.testing.assert_close((ours, total), torchs(x, weight, bias, residual=residual), equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2, :], id="every other row"),
        pytest.param(lambda x: x[:, :, 4:12], id="slice of columns"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed, as channels-first activations are"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1), id="expanded batch"),
    ],
)
def test_other_layouts(view: Any, assert_accurate: Any) -> None:
    x, residual = (view(tensor) for tensor in inputs((2, 6, 14))[:2])
    ours = layer_norm(x, residual=residual, impl="triton")
    for result in zip(ours, torchs(x, residual=residual), formula(x, residual=residual), strict=True):
        assert_accurate(*result)


@pytest.mark.parametrize("impl", ["triton", "reference", None])
def test_gradients_are_torchs(impl: str | None) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs((3, 8))]
    x, residual, weight, bias = tensors
    ours = layer_norm(x, weight, bias, residual=residual, impl=impl)
    expected = torchs(x, weight, bias, residual=residual)
    grads = [torch.autograd.grad((y.square() + total).sum(), tensors) for y, total in (ours, expected)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_opcheck() -> None:
    x, residual, weight, bias = inputs((2, 5, 12))
    layer_norm(x, impl="triton")
    plain, add = torch.ops.catimage_accel.layer_norm.default, torch.ops.catimage_accel.add_layer_norm.default
    torch.library.opcheck(plain, (x, weight, bias, 1e-5))
    torch.library.opcheck(plain, (x.transpose(0, 1)[:0], None, None, 1e-5))
    torch.library.opcheck(add, (x, residual, weight, None, 1e-5))
    torch.library.opcheck(add, (x.transpose(0, 1), residual.transpose(0, 1), None, bias, 1e-5))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    x, residual, weight, bias = inputs((2, 5, 12))
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    ours = compiled(x, weight, bias, residual=residual, impl=impl)
    torch.testing.assert_close(ours, torchs(x, weight, bias, residual=residual))


def test_a_row_too_wide_for_registers_goes_to_the_reference() -> None:
    x = inputs((2, MAX_TRITON_WIDTH + 1))[0]
    assert torch.equal(layer_norm(x), torchs(x)[0])
    with pytest.raises(ValueError, match=r"x has width 16385; impl 'triton' accepts up to 16384"):
        layer_norm(x, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0)}, r"x has shape \(2, 0\) .*accepted: a floating-point \(..., width\) tensor"),
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int8)}, r"x has shape .* dtype torch.int8"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\); accepted: \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.float16)}, r"bias has dtype torch.float16; accepted: x's, torch.float32"),
        ({"weight": torch.ones(8, device="meta")}, r"weight is on meta; accepted: x's device, cpu"),
        ({"residual": torch.ones(8)}, r"residual has shape \(8,\); accepted: x's, \(2, 8\), or None"),
        ({"residual": torch.ones(2, 8, dtype=torch.float64)}, r"residual has dtype torch.float64"),
        ({"eps": float("nan")}, r"eps is nan; accepted: a finite number of 0 or more"),
        ({"eps": -1.0}, r"eps is -1.0"),
        ({"impl": "fast"}, r"impl is 'fast'; accepted: "),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm(**({"x": torch.zeros(2, 8)} | change))
