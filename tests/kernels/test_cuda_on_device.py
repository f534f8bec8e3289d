"""The kernels of ``group_norm`` and ``attention`` on a device: CUDA's where they were built, Triton's beside them."""

from __future__ import annotations

from typing import Any

import pytest
import test_attention
import torch
from test_emulated_attention import SHAPES as ATTENTION_SHAPES
from test_group_norm import SHAPES, channels_last, formula, inputs, laid_out, torchs
from torch import Tensor

from catimage_accel.kernels import attention, cuda, dispatch, group_norm
from catimage_accel.kernels.build import CUDA

pytestmark = pytest.mark.gpu

LARGE = [
    pytest.param((2, 320, 64, 64), 32, 0.0, id="a cluster of blocks"),
    pytest.param((1, 64, 256, 256), 2, 100.0, id="groups larger than a cluster"),
    pytest.param((1, 20000, 3), 1, 0.0, id="a group of more channels than a block has threads for"),
    pytest.param((1, 2560, 32, 33), 32, 0.0, id="channels of odd length"),
]
IMPLS = [
    pytest.param("cuda", marks=pytest.mark.skipif(not cuda.BUILT, reason=f"not built: {CUDA.how_to_build}")),
    pytest.param("triton", marks=pytest.mark.skipif(dispatch.TRITON_INTERPRETS, reason="TRITON_INTERPRET is set")),
]
on_devices = pytest.mark.parametrize("impl", IMPLS)
in_layouts = pytest.mark.parametrize("layout", ["NC", "channels last"])


def to_device(layout: str, *tensors: Tensor) -> list[Tensor]:
    x, *rest = (tensor.cuda() for tensor in tensors)
    return [laid_out(x, layout), *rest]


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


@on_devices
@in_layouts
@pytest.mark.parametrize("side", [21, 200])
def test_same_bits_on_a_device_whatever_the_batch(side: int, layout: str, impl: str) -> None:
    x, weight, bias = to_device(layout, *inputs((3, 8, side, side)))
    together = group_norm(x, 2, weight, bias, impl=impl)
    assert torch.equal(together, group_norm(x, 2, weight, bias, impl=impl))
    assert torch.equal(together[1:2], group_norm(x[1:2], 2, weight, bias, impl=impl))


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
    x = laid_out(x, layout)
    ours = group_norm(x, groups, impl=impl)
    expected = formula(small, groups)
    for part in (0, repeats // 2, repeats - 1):
        got = ours[..., part * 2**20 : (part + 1) * 2**20]
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-3)


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


@pytest.mark.skipif(not cuda.BUILT, reason=f"not built: {CUDA.how_to_build}")
def test_opcheck_on_a_device() -> None:
    x, weight, bias = to_device("NC", *inputs((2, 8, 5, 6)))
    group_norm(x, 4, impl="cuda")
    op = torch.ops.catimage_accel_cuda.group_norm.default
    torch.library.opcheck(op, (x, 4, weight, bias, 1e-5, True, None))
    torch.library.opcheck(op, (channels_last(x), 4, None, None, 1e-5, False, torch.randn(8, 2, device="cuda").t()))
    torch.library.opcheck(op, (x.transpose(2, 3)[:0], 4, weight, None, 1e-5, False, None))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_on_a_device(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, impl: str, assert_accurate: Any
) -> None:
    q, k, v = (x.cuda() for x in test_attention.inputs(*shape, dtype))
    for scale in (None, -0.1, 0.0):
        exact = test_attention.formula(q, k, v, scale)
        assert_accurate(attention(q, k, v, scale=scale, impl=impl), test_attention.torchs(q, k, v, scale), exact)


@on_devices
def test_attention_on_a_device_of_views(impl: str, assert_accurate: Any) -> None:
    """Also of those whose rows are not on 16 bytes, which are copied."""
    fused = test_attention.inputs(2, 50, 50, 2, 3 * 40 + 1, torch.float16)[0].cuda()
    for first in (0, 1):
        q, k, v = fused[..., first : first + 120].split(40, dim=3)
        ours, torchs_result = attention(q, k, v, impl=impl), test_attention.torchs(q, k, v)
        assert_accurate(ours, torchs_result, test_attention.formula(q, k, v))


@on_devices
@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 0)], ids=["no batch", "no queries", "no keys"])
def test_attention_on_a_device_of_nothing(sizes: tuple[int, int, int], impl: str) -> None:
    batch, queries, keys = sizes
    q, k, v = (x.cuda() for x in test_attention.inputs(batch, queries, keys, 2, 40, torch.float16))
    ours = attention(q, k, v, impl=impl)
    assert ours.shape == q.shape
    assert not ours.any()


@pytest.mark.skipif(not cuda.BUILT, reason=f"not built: {CUDA.how_to_build}")
def test_opcheck_of_attention_on_a_device() -> None:
    q, k, v = (x.cuda() for x in test_attention.inputs(2, 20, 77, 2, 40, torch.float16))
    attention(q, k, v, impl="cuda")
    op = torch.ops.catimage_accel_cuda.attention.default
    torch.library.opcheck(op, (q, k, v, 0.2))
    torch.library.opcheck(op, (q.transpose(1, 2), k.transpose(1, 2)[:, :2], v.transpose(1, 2)[:, :2], 0.2))
