"""The CUDA kernel of ``attention``, its source run on the CPU, against the formula in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation import compile_emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import formula, inputs, torchs
from torch import Tensor

from catimage_accel.kernels.build import CUDA

DTYPES = [torch.float16, torch.bfloat16]
MARGIN = 64  # NaN around q, k, v and the result: what is read or written beyond them shows
HEAD_DIMS = [40, 64, 80, 160]

pytestmark = pytest.mark.skipif(CUDA.find_compiler() is None, reason="nvcc was not found")

Emulate = Callable[..., Tensor]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    call = compile_emulation("attention", tmp_path_factory.mktemp("emulated")).emulate_attention
    call.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    call.argtypes = [
        number, *[pointer] * 5, ctypes.c_int64, number, number, number, number, ctypes.c_float, number,
    ]  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, order: int = 1) -> Tensor:
        batch, queries, heads, head_dim = q.shape
        out = torch.full((q.numel() + 2 * MARGIN,), float("nan"), dtype=q.dtype)
        inside = slice(MARGIN, MARGIN + q.numel())
        q, k, v = (guarded(x) for x in (q, k, v))
        strides = (ctypes.c_int64 * 9)(*(x.stride(dim) for x in (q, k, v) for dim in range(3)))
        failure = call(
            DTYPES.index(q.dtype), q.data_ptr(), k.data_ptr(), v.data_ptr(), out[inside].data_ptr(), strides, batch,
            heads, queries, k.shape[1], head_dim, head_dim**-0.5 if scale is None else scale, order,
        )  # fmt: skip
        assert failure is None, failure
        result = out[inside].reshape(batch, queries, heads, head_dim).clone()
        out[inside] = float("nan")
        assert out.isnan().all()
        return result

    return run


def guarded(x: Tensor) -> Tensor:
    """The same values with the same strides, and NaN in all other memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((extent + 2 * MARGIN,), float("nan"), dtype=x.dtype)
    once = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
    memory[MARGIN:].as_strided(once.shape, once.stride()).copy_(once)
    return memory[MARGIN:].as_strided(x.shape, x.stride())


SHAPES = [
    pytest.param((2, 130, 130, 2, 40), id="SD1.5 head_dim: products over 16, 16 and 8 columns; ragged lengths"),
    pytest.param((1, 128, 128, 1, 64), id="SDXL head_dim: lengths that divide into blocks"),
    pytest.param((1, 70, 70, 3, 80), id="head_dim 80"),
    pytest.param((2, 70, 64, 1, 160), id="head_dim 160: a warp has 16 rows, two stages of 32 keys"),
    pytest.param((2, 70, 77, 2, 40), id="one text, head_dim 40: one stage of 80 keys"),
    pytest.param((1, 70, 77, 2, 64), id="one text, head_dim 64"),
    pytest.param((1, 70, 154, 1, 80), id="two texts, head_dim 80"),
    pytest.param((1, 20, 77, 1, 160), id="one text, head_dim 160: the last stage partly masked"),
    pytest.param((1, 1, 1, 1, 64), id="one query, one key"),
    pytest.param((1, 5, 300, 1, 40), id="fewer queries than a warp has rows"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, emulate: Emulate, assert_accurate: Any
) -> None:
    q, k, v = inputs(*shape, dtype)
    assert_accurate(emulate(q, k, v), torchs(q, k, v), formula(q, k, v))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 140), st.integers(1, 200), st.integers(1, 2), st.sampled_from(HEAD_DIMS),
    st.sampled_from(DTYPES), st.floats(0.01, 4), st.integers(0, 1000),
)  # fmt: skip
def test_any_length_and_scale(
    emulate: Emulate, batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, scale: float,
    seed: int,
) -> None:  # fmt: skip
    q, k, v = inputs(batch, queries, keys, heads, head_dim, dtype, seed)
    scale /= head_dim**0.5
    tolerance = 5e-3 if dtype == torch.float16 else 4e-2
    exact = formula(q, k, v, scale)
    torch.testing.assert_close(emulate(q, k, v, scale).double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("keys", [77, 130])
def test_same_bits_whatever_the_batch_and_the_order_of_threads(head_dim: int, keys: int, emulate: Emulate) -> None:
    q, k, v = inputs(2, 70, keys, 2, head_dim, torch.float16)
    together = emulate(q, k, v)
    assert torch.equal(emulate(q, k, v, order=-1), together)
    assert torch.equal(emulate(q[1:], k[1:], v[1:]), together[1:])


def test_large_scores_do_not_overflow(emulate: Emulate, assert_accurate: Any) -> None:
    q, k, v = inputs(1, 40, 70, 1, 64, torch.float16)
    q *= 1000
    assert_accurate(emulate(q, k, v), torchs(q, k, v), formula(q, k, v))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("keys", [77, 130])
def test_poison_goes_where_it_goes_in_torch(where: str, poison: float, keys: int, emulate: Emulate) -> None:
    """Key 3 is in the first stage of keys and finite ones follow, also for rows that have seen only -inf."""
    tensors = dict(zip("qkv", inputs(1, 40, keys, 2, 40, torch.float16), strict=True))
    tensors[where][0, 3, 1, 5] = poison
    ours = emulate(**tensors)
    expected = torchs(**{name: tensor.float() for name, tensor in tensors.items()})
    torch.testing.assert_close(ours.float(), expected, equal_nan=True, atol=5e-3, rtol=5e-3)
    assert ours[:, :, 0].isfinite().all()


def test_scores_of_minus_infinity_in_a_whole_stage(emulate: Emulate) -> None:
    q, k, v = inputs(1, 4, 140, 1, 40, torch.float16)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :130, :, 0] = float("-inf")
    expected = torchs(q.float(), k.float(), v.float())
    torch.testing.assert_close(emulate(q, k, v).float(), expected, atol=5e-3, rtol=5e-3)


def test_views_are_read_in_place(emulate: Emulate, assert_accurate: Any) -> None:
    """One projection split in three, heads before the sequence, one image for all."""
    fused = inputs(2, 50, 50, 2, 3 * 40, torch.float16)[0]
    for q, k, v in (
        fused.split(40, dim=3),
        (x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused.split(40, dim=3)),
        [fused[:1, :, :, :40].expand(2, -1, -1, -1)] * 3,
    ):
        assert_accurate(emulate(q, k, v), torchs(q, k, v), formula(q, k, v))


def test_other_head_dims_are_told(emulate: Emulate) -> None:
    with pytest.raises(AssertionError, match="no kernel for this head_dim"):
        emulate(*inputs(1, 4, 4, 1, 48, torch.float16))
