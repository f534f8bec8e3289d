"""``group_norm``: the Triton kernels (in the interpreter) and the reference against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import cpu, group_norm
from catimage_accel.kernels.build import CPU

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]
SHAPES = [  # shape, groups, mean
    pytest.param((2, 20, 9, 7), 4, 0.0, id="a group smaller than a block"),
    pytest.param((1, 70, 9, 8), 7, 0.0, id="channels over more than one block of them"),
    pytest.param((1, 8, 50, 50), 2, 0.0, id="a group over several chunks, the last one short"),
    pytest.param((1, 64, 20, 20), 1, 1000.0, id="a large mean merged over several chunks"),
    pytest.param((1, 8, 40, 40), 2, 1000.0, id="a mean of 1000 standard deviations: E[x^2] - E[x]^2 would cancel"),
    pytest.param((2, 6, 1, 1), 3, 0.0, id="one pixel"),
    pytest.param((2, 6, 1, 1), 6, 0.0, id="one value a group: the bias is left"),
    pytest.param((2, 15, 5, 3), 5, 0.0, id="odd channels"),
    pytest.param((1, 6, 5, 3), 1, 0.0, id="one group"),
    pytest.param((2, 12, 50), 3, 0.0, id="3D, as attention layers have it"),
    pytest.param((2, 12), 3, 0.0, id="2D"),
    pytest.param((1, 4, 3, 5, 7), 2, 0.0, id="5D video"),
    pytest.param((0, 8, 4, 4), 2, 0.0, id="empty batch"),
    pytest.param((2, 8, 0, 4), 2, 0.0, id="no pixels"),
]

ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.BUILT, reason=f"not built: {CPU.how_to_build}"))
in_other_layouts = pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, ::2, 1:], id="strided slice"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed image"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded batch"),
        pytest.param(lambda x: channels_last(x)[:, 4:], id="slice of channels-last channels"),
    ],
)


def formula(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    activation: str | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x = shifted(x.double(), shift)
    grouped = x.reshape(x.shape[0], groups, -1) if x.numel() else x
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    per_channel = (-1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.double().reshape(per_channel)
    y = y if bias is None else y + bias.double().reshape(per_channel)
    return y * y.sigmoid() if activation == "silu" else y


def torchs(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    activation: str | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    # In NC... order: on CPU torch's channels-last kernel takes the variance as E[x^2] - E[x]^2, too easy to beat.
    y = torch.group_norm(shifted(x, shift).contiguous(), groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x + shift.to(x.dtype).reshape(*shift.shape, *(1,) * (x.ndim - 2))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def laid_out(x: Tensor, layout: str) -> Tensor:
    return channels_last(x) if layout == "channels last" else x


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + offset
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NC", "channels last"])
@pytest.mark.parametrize(("shape", "groups", "offset"), SHAPES)
def test_accuracy(
    shape: tuple[int, ...], groups: int, offset: float, layout: str, dtype: torch.dtype, assert_accurate: Any
) -> None:
    x, weight, bias = inputs(shape, dtype, offset)
    x = laid_out(x, layout)
    for activation in (None, "silu"):
        ours = group_norm(x, groups, weight, bias, activation=activation, impl="triton")
        arguments = (x, groups, weight, bias, 1e-5, activation)
        assert_accurate(ours, torchs(*arguments), formula(*arguments))
        assert ours.stride() == x.stride()


@pytest.mark.parametrize("impl", ["triton", ON_CPU])
@pytest.mark.parametrize("layout", ["NC", "channels last"])
@pytest.mark.parametrize(("with_weight", "with_bias"), [(False, False), (True, False), (False, True)])
def test_optional_affine(with_weight: bool, with_bias: bool, layout: str, impl: str, assert_accurate: Any) -> None:
    x, weight, bias = inputs((2, 12, 5, 6))
    x = laid_out(x, layout)
    arguments = (x, 3, weight if with_weight else None, bias if with_bias else None)
    assert_accurate(group_norm(*arguments, impl=impl), torchs(*arguments), formula(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NC", "channels last"])
@pytest.mark.parametrize(
    ("shape", "groups", "offset"),
    [
        pytest.param((2, 20, 9, 7), 4, 0.0, id="a shift for each image and channel"),
        pytest.param((1, 70, 9, 8), 7, 0.0, id="channels over more than one block of them"),
        pytest.param((1, 8, 50, 50), 2, 0.0, id="a group over several chunks, the last one short"),
        pytest.param((1, 8, 40, 40), 2, 1000.0, id="a shift of 1000 standard deviations"),
        pytest.param((3, 12, 5), 3, 0.0, id="3D"),
        pytest.param((2, 12), 3, 0.0, id="2D"),
        pytest.param((0, 8, 4, 4), 2, 0.0, id="empty batch"),
    ],
)
def test_shift(
    shape: tuple[int, ...], groups: int, offset: float, layout: str, dtype: torch.dtype, assert_accurate: Any
) -> None:
    """The time embedding that diffusers adds before the norm."""
    x, weight, bias = inputs(shape, dtype)
    x = laid_out(x, layout)
    shift = (torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    ours = group_norm(x, groups, weight, bias, activation="silu", shift=shift, impl="triton")
    arguments = (x, groups, weight, bias, 1e-5, "silu", shift)
    assert_accurate(ours, torchs(*arguments), formula(*arguments))
    assert ours.stride() == x.stride()


@pytest.mark.parametrize("impl", ["triton", "reference", None])
def test_shift_as_a_view_of_a_projection(impl: str | None, assert_accurate: Any) -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    shift = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)).t()[:, ::2]
    ours = group_norm(x, 4, weight, bias, shift=shift, impl=impl)
    arguments = (x, 4, weight, bias, 1e-5, None, shift)
    assert_accurate(ours, torchs(*arguments), formula(*arguments))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.booleans(),
    st.sampled_from(DTYPES), st.sampled_from([1e-6, 1e-5, 1e-2]), st.sampled_from([None, "silu"]),
)  # fmt: skip
def test_any_shape(
    batch: int, groups: int, group_channels: int, height: int, width: int, last: bool, dtype: torch.dtype, eps: float,
    activation: str | None,
) -> None:  # fmt: skip
    x, weight, bias = inputs((batch, groups * group_channels, height, width), dtype)
    x = channels_last(x) if last else x
    ours = group_norm(x, groups, weight, bias, eps, activation=activation, impl="triton")
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    exact = formula(x, groups, weight, bias, eps, activation)
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["NC", "channels last"])
def test_same_bits_whatever_the_batch(layout: str) -> None:
    x, weight, bias = inputs((3, 8, 20, 21))
    x = laid_out(x, layout)
    together = group_norm(x, 2, weight, bias, impl="triton")
    assert torch.equal(together, group_norm(x, 2, weight, bias, impl="triton"))
    assert torch.equal(together[1:2], group_norm(x[1:2], 2, weight, bias, impl="triton"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["NC", "channels last"])
def test_poison_stays_in_its_group(layout: str, poison: float) -> None:
    x, weight, bias = inputs((2, 8, 6, 6))
    x[1, 3, 2, 2] = poison
    x = laid_out(x, layout)
    ours = group_norm(x, 4, weight, bias, activation="silu", impl="triton")
    assert ours[1, 2:4].isnan().all()
    torch.testing.assert_close(ours, torchs(x, 4, weight, bias, 1e-5, "silu"), equal_nan=True, atol=1e-5, rtol=1e-5)


@in_other_layouts
def test_other_layouts(view: Any, assert_accurate: Any) -> None:
    x = view(inputs((2, 12, 6, 7))[0])
    assert_accurate(group_norm(x, 4, impl="triton"), torchs(x, 4), formula(x, 4))


@pytest.mark.parametrize("impl", ["triton", "reference", ON_CPU, None])
def test_gradients_are_torchs(impl: str | None) -> None:
    tensors = [x.requires_grad_() for x in (*inputs((2, 8, 3, 3)), torch.randn(2, 8))]
    x, weight, bias, shift = tensors
    ours = group_norm(x, 4, weight, bias, activation="silu", shift=shift, impl=impl)
    expected = torchs(x, 4, weight, bias, 1e-5, "silu", shift)
    for got, want in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_opcheck() -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    group_norm(x, 4, impl="triton")
    op = torch.ops.catimage_accel.group_norm.default
    torch.library.opcheck(op, (x, 4, weight, bias, 1e-5, True))
    torch.library.opcheck(op, (channels_last(x), 4, None, None, 1e-5, False))
    torch.library.opcheck(op, (x.transpose(2, 3)[:0], 4, weight, None, 1e-5, False))
    torch.library.opcheck(op, (x, 4, weight, bias, 1e-5, True, torch.randn(2, 8)))
    torch.library.opcheck(op, (channels_last(x), 4, None, None, 1e-5, False, torch.randn(8, 2).t()))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    ours = compiled(x, 4, weight, bias, activation="silu", impl=impl)
    torch.testing.assert_close(ours, torchs(x, 4, weight, bias, 1e-5, "silu"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x has shape \(8,\) .*accepted: a floating-point \(batch, channels, ...\) tensor"),
        ({"x": torch.zeros(1, 8, 2, dtype=torch.int8)}, r"x has shape .* dtype torch.int8"),
        ({"num_groups": 3}, r"num_groups is 3; accepted: a divisor of x's 8 channels"),
        ({"num_groups": 0}, r"num_groups is 0"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\); accepted: \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.float16)}, r"bias has dtype torch.float16; accepted: x's, torch.float32"),
        ({"weight": torch.ones(8, device="meta")}, r"weight is on meta; accepted: x's device, cpu"),
        ({"shift": torch.zeros(8)}, r"shift has shape \(8,\); accepted: \(2, 8\), one per image and channel, or None"),
        ({"shift": torch.zeros(2, 8, dtype=torch.float16)}, r"shift has dtype torch.float16; accepted: x's"),
        ({"eps": float("nan")}, r"eps is nan; accepted: a finite number of 0 or more"),
        ({"eps": -1.0}, r"eps is -1.0"),
        ({"activation": "relu"}, r"activation is 'relu'; accepted: None, 'silu'"),
        ({"impl": "cudnn"}, r"impl is 'cudnn'; accepted: 'reference', 'triton', 'cuda', 'cpu' or None"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm(**({"x": torch.zeros(2, 8, 3, 3), "num_groups": 4} | change))
