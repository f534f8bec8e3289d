"""``int8_conv``: every implementation against exact integer convolutions, by the accuracy rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_int8_linear import integers, most_rounding
from torch import Tensor

from catimage_accel.kernels import int8_conv
from catimage_accel.kernels.accuracy import allowed_error, excess_error, largest_error
from catimage_accel.kernels.tuning import use_config

pytest.importorskip("triton")

# Not bfloat16: Triton's interpreter cuts it off where a GPU rounds it.
DTYPES = [torch.float32, torch.float16]
SHAPES = [  # shape of x, out_channels, kernel, stride, padding
    pytest.param((2, 32, 9, 7), 40, 3, 1, 1, id="3x3, as in residual blocks; a row of the image ends inside a block"),
    pytest.param((1, 32, 8, 8), 20, 3, 2, 1, id="3x3, stride 2: downsampling"),
    pytest.param((1, 16, 7, 9), 20, 3, 2, 1, id="stride 2, odd sides"),
    pytest.param((2, 64, 5, 5), 70, 1, 1, 0, id="1x1: shortcuts"),
    pytest.param((1, 80, 4, 6), 8, 3, 1, 1, id="channels end inside a block"),
    pytest.param((2, 4, 6, 6), 16, 3, 1, 1, id="4 channels, as latents have"),
    pytest.param((1, 8, 6, 6), 16, 3, 1, 1, id="8 channels"),
    pytest.param((1, 21, 5, 3), 7, 3, 1, 1, id="odd channels"),
    pytest.param((1, 16, 1, 1), 8, 3, 1, 1, id="one pixel: eight taps outside"),
    pytest.param((1, 16, 5, 6), 8, 3, 1, 0, id="no padding"),
    pytest.param((1, 16, 4, 5), 8, 3, 1, 3, id="padding wider than the kernel: results of zeros only"),
    pytest.param((1, 3, 4, 5), 2, 2, 1, 0, id="2x2"),
    pytest.param((1, 16, 9, 9), 8, 5, 2, 2, id="5x5, stride 2"),
    pytest.param((0, 16, 4, 4), 8, 3, 1, 1, id="empty batch"),
]


def inputs(
    shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, padding: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in shape[2:])
    residual = torch.randn(shape[0], out_channels, height, width, generator=generator).to(dtype)
    return {
        "x": integers(*shape).contiguous(memory_format=torch.channels_last),
        "weight": integers(out_channels, shape[1], kernel, kernel, seed=2), "x_scale": 0.02,
        "weight_scale": 0.01 * torch.rand(out_channels, generator=generator) + 0.001,
        "bias": torch.randn(out_channels, generator=generator).to(dtype), "residual": residual,
        "stride": stride, "padding": padding,
    }  # fmt: skip


def formula(**arguments: Any) -> Tensor:
    """Sums of windows in int64, which no library's algorithm touches."""
    x, weight, stride, padding = (arguments[name] for name in ("x", "weight", "stride", "padding"))
    x = F.pad(x.long(), (padding,) * 4)
    windows = x.unfold(2, weight.shape[2], stride).unfold(3, weight.shape[3], stride)  # (N, C, h, w, kh, kw)
    product = torch.einsum("nchwij,ocij->nohw", windows, weight.long())
    per_channel = (-1, 1, 1)
    y = product.double() * arguments["x_scale"] * arguments["weight_scale"].double().reshape(per_channel)
    bias, residual = arguments.get("bias"), arguments.get("residual")
    y = y if bias is None else y + bias.double().reshape(per_channel)
    return y if residual is None else y + residual.double()


def torchs(dtype: torch.dtype, **arguments: Any) -> Tensor:
    """The dequantized numbers through torch's convolution in float32, then rounded."""
    x = arguments["x"].float() * arguments["x_scale"]
    weight = arguments["weight"].float() * arguments["weight_scale"][:, None, None, None]
    bias, residual = arguments.get("bias"), arguments.get("residual")
    y = F.conv2d(x, weight, None if bias is None else bias.float(), arguments["stride"], arguments["padding"])
    return (y if residual is None else y + residual.float()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "stride", "padding"), SHAPES)
def test_accuracy(
    shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, padding: int, dtype: torch.dtype,
    assert_accurate: Any,
) -> None:  # fmt: skip
    arguments = inputs(shape, out_channels, kernel, stride, padding, dtype)
    for impl in ("triton", "reference", None):
        ours = int8_conv(**arguments, out_dtype=dtype, impl=impl)
        assert_accurate(ours, torchs(dtype, **arguments), formula(**arguments))
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "out_channels", "kernel", "stride", "padding"), SHAPES[:6])
def test_quantized_again(shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, padding: int) -> None:
    """Half a level from the exact result, and no more beyond it than that has before it is rounded."""
    arguments = inputs(shape, out_channels, kernel, stride, padding)
    scale, exact = 0.11, formula(**arguments)
    allowed = allowed_error(torchs(torch.float32, **arguments), exact)
    for impl in ("triton", "reference", None):
        levels = int8_conv(**arguments, out_dtype=torch.int8, output_scale=scale, impl=impl)
        assert levels.dtype == torch.int8
        assert excess_error(levels, exact, scale) <= allowed
        real = int8_conv(**arguments, out_dtype=torch.float32, output_scale=scale, impl=impl)
        assert torch.equal(real, levels.float() * scale)


def test_padding_is_zero_at_every_border() -> None:
    """Ones everywhere: a result counts the taps inside of the image."""
    x, weight = torch.ones(2, 16, 3, 4, dtype=torch.int8), torch.ones(8, 16, 3, 3, dtype=torch.int8)
    y = int8_conv(x, weight, 1.0, torch.ones(8), padding=1, out_dtype=torch.float32, impl="triton")
    taps = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    assert torch.equal(y, (16.0 * taps).expand(2, 8, 3, 4))


@pytest.mark.parametrize(("with_bias", "with_residual"), [(False, False), (True, False), (False, True)])
def test_optional_terms(with_bias: bool, with_residual: bool, assert_accurate: Any) -> None:
    arguments = inputs((1, 16, 5, 4), 24, 3, 1, 1)
    arguments["bias"] = arguments["bias"] if with_bias else None
    arguments["residual"] = arguments["residual"] if with_residual else None
    for impl in ("triton", "reference"):
        ours = int8_conv(**arguments, out_dtype=torch.float32, impl=impl)
        assert_accurate(ours, torchs(torch.float32, **arguments), formula(**arguments))


@pytest.mark.parametrize("scale", [1e-3, 1e3], ids=["all saturate", "all round to zero"])
def test_saturation(scale: float) -> None:
    arguments = inputs((1, 16, 5, 4), 24, 3, 1, 1)
    expected = (formula(**arguments) / scale).round().clamp(-128, 127).to(torch.int8)
    for impl in ("triton", "reference"):
        assert torch.equal(int8_conv(**arguments, out_dtype=torch.int8, output_scale=scale, impl=impl), expected)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8),
    st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 2, 1)]), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_any_shape(
    batch: int, channels: int, out_channels: int, height: int, width: int, how: tuple[int, int, int],
    dtype: torch.dtype, whole_blocks: bool,
) -> None:  # fmt: skip
    channels = 32 * (channels % 3 + 1) if whole_blocks else channels
    arguments = inputs((batch, channels, height, width), out_channels, *how, dtype)
    config = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    with use_config("int8_conv", config):
        ours = int8_conv(**arguments, out_dtype=dtype, impl="triton")
    product = formula(**arguments | {"bias": None, "residual": None})
    assert largest_error(ours, formula(**arguments)) <= most_rounding(dtype, product, arguments)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.contiguous(), id="NCHW"),
        pytest.param(lambda x: x[:, :, ::2, 1:], id="strided slice"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed image"),
        pytest.param(lambda x: x[:, 16:], id="slice of channels"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded batch"),
    ],
)
def test_other_layouts(view: Any) -> None:
    x = view(integers(2, 32, 6, 7).contiguous(memory_format=torch.channels_last))
    arguments = inputs(tuple(x.shape), 24, 3, 1, 1)
    arguments |= {"x": x, "weight": arguments["weight"].transpose(2, 3)}
    ours = int8_conv(**arguments, out_dtype=torch.float32, impl="triton")
    exact = formula(**arguments)
    assert largest_error(ours, exact) <= allowed_error(torchs(torch.float32, **arguments), exact)


def test_same_bits_whatever_the_batch() -> None:
    arguments = inputs((3, 16, 7, 6), 24, 3, 1, 1)
    together = int8_conv(**arguments, impl="triton")
    alone = {**arguments, "x": arguments["x"][1:2], "residual": arguments["residual"][1:2]}
    assert torch.equal(together[1:2], int8_conv(**alone, impl="triton"))


def test_opcheck() -> None:
    x, weight, scale = integers(2, 16, 5, 4), integers(6, 16, 3, 3), torch.ones(6)
    int8_conv(x, weight, 1.0, scale, impl="triton")
    op = torch.ops.catimage_accel.int8_conv.default
    residual = torch.randn(2, 6, 5, 4)
    torch.library.opcheck(op, (x, weight, 0.1, scale, torch.ones(6), 1, 1, residual, torch.float16, None))
    torch.library.opcheck(op, (x.transpose(2, 3), weight, 0.1, scale, None, 2, 1, None, torch.int8, 0.5))
    torch.library.opcheck(op, (x[:0], weight, 0.1, scale, None, 1, 1, None, torch.float32, 0.5))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    arguments = inputs((1, 16, 5, 4), 8, 3, 1, 1)
    compiled = torch.compile(int8_conv, fullgraph=True, backend="aot_eager")
    ours = compiled(**arguments, out_dtype=torch.float32, impl=impl)
    torch.testing.assert_close(ours, formula(**arguments).float())


GOOD = {"x": torch.zeros(2, 8, 5, 5, dtype=torch.int8), "weight": torch.zeros(4, 8, 3, 3, dtype=torch.int8),
        "x_scale": 1.0, "weight_scale": torch.ones(4)}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 5, 5)}, r"x has shape \(2, 8, 5, 5\) and dtype torch.float32; accepted: an int8"),
        ({"x": torch.zeros(8, 5, 5, dtype=torch.int8)}, r"x has shape \(8, 5, 5\)"),
        ({"weight": torch.zeros(4, 7, 3, 3, dtype=torch.int8)}, r"weight has shape \(4, 7, 3, 3\) .*channels, 8, "),
        ({"weight": torch.zeros(4, 8, dtype=torch.int8)}, r"weight has shape \(4, 8\)"),
        ({"weight": torch.zeros(4, 8, 3, 3)}, r"weight has shape \(4, 8, 3, 3\) and dtype torch.float32"),
        ({"weight": GOOD["weight"].to("meta")}, r"weight is on meta; accepted: x's device, cpu"),
        ({"x": torch.zeros(2, 8, 2, 5, dtype=torch.int8)}, r"x has shape \(2, 8, 2, 5\); accepted for weight of shape"),
        ({"stride": 0}, r"stride is 0; accepted: a whole number from 1"),
        ({"padding": -1}, r"padding is -1; accepted: a whole number from 0"),
        ({"x_scale": float("inf")}, r"x_scale is inf; accepted: a finite number above 0"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale has shape \(3,\) .*accepted: a float32 \(4,\)"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\); accepted: \(4,\)"),
        ({"residual": torch.ones(2, 4, 5, 5)}, r"residual has shape .*; accepted: the result's, \(2, 4, 3, 3\)"),
        ({"out_dtype": torch.int8}, r"output_scale is None"),
        ({"out_dtype": torch.int64}, r"out_dtype is torch.int64"),
        ({"impl": "int_mm"}, r"impl is 'int_mm'; accepted: 'reference', 'triton' or None"),
        ({"impl": "triton", "out_dtype": torch.float64}, r"out_dtype is torch.float64; accepted by impl 'reference'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_conv(**(GOOD | change))
