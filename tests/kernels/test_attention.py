"""``attention``: the Triton kernel (in the interpreter) and the reference against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import attention

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def torchs(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def inputs(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype) for n in (queries, keys, keys))
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 130, 130, 2, 40), id="SD1.5 head_dim: two column blocks, the second partly masked"),
        pytest.param((1, 128, 128, 1, 64), id="SDXL head_dim: lengths that divide into blocks"),
        pytest.param((2, 70, 77, 2, 64), id="cross-attention over one text"),
        pytest.param((1, 70, 154, 1, 80), id="cross-attention over two texts, head_dim 64 + 16"),
        pytest.param((1, 40, 40, 1, 160), id="head_dim 128 + 32"),
        pytest.param((1, 33, 20, 1, 256), id="largest head_dim"),
        pytest.param((1, 20, 20, 3, 8), id="head_dim under a tensor core's width"),
        pytest.param((1, 20, 20, 1, 1), id="head_dim 1"),
        pytest.param((1, 20, 20, 1, 33), id="odd head_dim"),
        pytest.param((1, 1, 1, 1, 64), id="one query, one key"),
        pytest.param((0, 20, 20, 2, 40), id="empty batch"),
        pytest.param((1, 0, 20, 2, 40), id="no queries"),
        pytest.param((1, 3, 0, 2, 40), id="no keys: zeros, as torch"),
    ],
)
def test_accuracy(shape: tuple[int, int, int, int, int], dtype: torch.dtype, assert_accurate: Any) -> None:
    q, k, v = inputs(*shape, dtype)
    for impl in ("triton", "reference", None):
        assert_accurate(attention(q, k, v, impl=impl), torchs(q, k, v), formula(q, k, v))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 150), st.integers(1, 150), st.integers(1, 3), st.integers(1, 256),
    st.sampled_from(DTYPES), st.floats(-4, 4), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_and_scale(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    q, k, v = inputs(batch, queries, keys, heads, head_dim, dtype, seed)
    scale /= head_dim**0.5
    exact = formula(q, k, v, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(
        attention(q, k, v, scale=scale, impl="triton").double(), exact, atol=tolerance, rtol=tolerance
    )


def test_large_scores_do_not_overflow(assert_accurate: Any) -> None:
    q, k, v = inputs(1, 40, 70, 1, 64)
    q *= 1000
    assert_accurate(attention(q, k, v, impl="triton"), torchs(q, k, v), formula(q, k, v))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_poison_goes_where_it_goes_in_torch(where: str, poison: float) -> None:
    """Key 3 is in the first block of keys and finite ones follow, also for rows that have seen only -inf."""
    tensors = dict(zip("qkv", inputs(1, 40, 70, 2, 40), strict=True))
    tensors[where][0, 3, 1, 5] = poison
    ours, expected = attention(**tensors, impl="triton"), torchs(**tensors)
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert ours[:, :, 0].isfinite().all()


def test_scores_of_minus_infinity_in_a_whole_block() -> None:
    q, k, v = inputs(1, 4, 140, 1, 16)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :130, :, 0] = float("-inf")
    torch.testing.assert_close(attention(q, k, v, impl="triton"), torchs(q, k, v), atol=1e-5, rtol=1e-5)


def test_views_are_read_in_place(assert_accurate: Any) -> None:
    """One projection split in three, heads before the sequence, a dense dimension that is not the last."""
    fused = inputs(2, 50, 50, 2, 3 * 40)[0]
    for q, k, v in (
        fused.split(40, dim=3),
        (x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused.split(40, dim=3)),
        (x.transpose(1, 3).contiguous().transpose(1, 3) for x in fused.split(40, dim=3)),
        [fused[:1, :, :, :40].expand(2, -1, -1, -1)] * 3,
    ):
        assert_accurate(attention(q, k, v, impl="triton"), torchs(q, k, v), formula(q, k, v))


@pytest.mark.parametrize("impl", ["triton", "reference", None])
def test_gradients_are_torchs(impl: str | None) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 9, 7, 2, 8)]
    ours = torch.autograd.grad(attention(*tensors, impl=impl).square().sum(), tensors)
    expected = torch.autograd.grad(torchs(*tensors).square().sum(), tensors)
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)


def test_opcheck() -> None:
    q, k, v = inputs(2, 20, 77, 2, 40)
    attention(q, k, v, impl="triton")
    op = torch.ops.catimage_accel.attention.default
    torch.library.opcheck(op, (q, k, v, 0.2))
    torch.library.opcheck(op, (q.transpose(1, 2), k.transpose(1, 2)[:, :2], v.transpose(1, 2)[:, :2], 0.2))
    torch.library.opcheck(op, (q[:0], k[:0], v[:0], 0.2))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    q, k, v = inputs(1, 20, 77, 2, 40)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, impl=impl), torchs(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 8)}, r"q has shape \(1, 4, 8\) .*accepted: a floating-point \(batch"),
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.int32)}, r"q has shape .* dtype torch.int32"),
        ({"q": torch.zeros(1, 4, 2, 0)}, r"head_dim of at least 1"),
        ({"k": torch.zeros(1, 5, 3, 8)}, r"k has shape \(1, 5, 3, 8\); accepted: \(1, any length, 2, 8\)"),
        ({"v": torch.zeros(1, 6, 2, 8)}, r"v has shape \(1, 6, 2, 8\); accepted: k's, \(1, 5, 2, 8\)"),
        ({"v": torch.zeros(1, 5, 2, 8, dtype=torch.float16)}, r"v has dtype torch.float16; accepted: q's, torch.f"),
        ({"k": torch.zeros(1, 5, 2, 8, device="meta")}, r"k is on meta; accepted: q's device, cpu"),
        ({"scale": float("nan")}, r"scale is nan; accepted: a finite number or None"),
        ({"impl": "cudnn"}, r"impl is 'cudnn'; accepted: 'reference', 'triton' or None"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8)}
    with pytest.raises(ValueError, match=message):
        attention(**(good | change))


def test_what_triton_does_not_take() -> None:
    wide = inputs(1, 4, 5, 1, 257)
    with pytest.raises(ValueError, match="q has head_dim 257; impl 'triton' accepts up to 256"):
        attention(*wide, impl="triton")
    torch.testing.assert_close(attention(*wide), torchs(*wide), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; impl 'triton' accepts torch.float16"):
        attention(*(x.double() for x in inputs(1, 4, 5, 1, 8)), impl="triton")
