"""``int8_linear``: every implementation against exact integer products, by the accuracy rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import int8_linear
from catimage_accel.kernels.accuracy import allowed_error, excess_error, largest_error
from catimage_accel.kernels.tuning import use_config

pytest.importorskip("triton")

# Not bfloat16: Triton's interpreter cuts it off where a GPU rounds it.
DTYPES = [torch.float32, torch.float16]
SHAPES = [  # shape of x, out_features
    pytest.param((2, 70, 160), 70, id="rows, columns and sums end inside a block"),
    pytest.param((5, 37), 19, id="in_features no multiple of 16: read byte by byte"),
    pytest.param((1, 320), 1280, id="one row, as a time embedding has it"),
    pytest.param((3, 1), 1, id="one number a row"),
    pytest.param((24, 64), 8, id="what torch._int_mm takes too"),
    pytest.param((130, 128), 130, id="more than one block each way, whole blocks of in_features"),
    pytest.param((64,), 8, id="1D"),
    pytest.param((2, 3, 2, 48), 16, id="4D"),
    pytest.param((0, 4, 16), 8, id="empty batch"),
]


def integers(*shape: int, seed: int = 0) -> Tensor:
    """All levels, the lowest included."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def inputs(shape: tuple[int, ...], out_features: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    weight_scale = 0.01 * torch.rand(out_features, generator=generator) + 0.001
    bias = torch.randn(out_features, generator=generator).to(dtype)
    residual = torch.randn(*shape[:-1], out_features, generator=generator).to(dtype)
    return {"x": integers(*shape), "weight": integers(out_features, shape[-1], seed=2), "x_scale": 0.02,
            "weight_scale": weight_scale, "bias": bias, "residual": residual}  # fmt: skip


def formula(
    x: Tensor, weight: Tensor, x_scale: float, weight_scale: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    product = x.long() @ weight.long().t()
    assert product.numel() == 0 or product.abs().max() < 2**31
    y = product.double() * x_scale * weight_scale.double()
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def torchs(dtype: torch.dtype, **arguments: Any) -> Tensor:
    """The dequantized numbers through torch's linear layer in float32, then rounded."""
    x = arguments["x"].float() * arguments["x_scale"]
    weight = arguments["weight"].float() * arguments["weight_scale"][:, None]
    bias = arguments.get("bias")
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    residual = arguments.get("residual")
    return (y if residual is None else y + residual.float()).to(dtype)


def most_rounding(dtype: torch.dtype, product: Tensor, arguments: dict[str, Any]) -> float:
    """What float32 arithmetic can cost: half a unit each for the scale, its product, two sums, the rounding to dtype.

    For shapes as they come: of a few values torch's result may be right to the bit by chance. ``product`` is the exact
    result without bias and residual.
    """
    parts = (product, arguments["bias"], arguments["residual"])
    magnitude = sum(part.abs().max().item() for part in parts if part is not None)
    return (2 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2) * magnitude


def implementations(shape: tuple[int, ...], out_features: int) -> list[str | None]:
    rows = torch.Size(shape[:-1]).numel()
    takes_int_mm = rows > 16 and out_features % 8 == 0 and shape[-1] % 8 == 0
    return ["triton", "reference", None, *(["int_mm"] if takes_int_mm else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "out_features"), SHAPES)
def test_accuracy(shape: tuple[int, ...], out_features: int, dtype: torch.dtype, assert_accurate: Any) -> None:
    arguments = inputs(shape, out_features, dtype)
    for impl in implementations(shape, out_features):
        ours = int8_linear(**arguments, out_dtype=dtype, impl=impl)
        assert_accurate(ours, torchs(dtype, **arguments), formula(**arguments))
        assert ours.is_contiguous()


@pytest.mark.parametrize(("shape", "out_features"), SHAPES)
def test_quantized_again(shape: tuple[int, ...], out_features: int) -> None:
    """Half a level from the exact result, and no more beyond it than that has before it is rounded."""
    arguments = inputs(shape, out_features)
    scale, exact = 0.11, formula(**arguments)
    allowed = allowed_error(torchs(torch.float32, **arguments), exact)
    for impl in implementations(shape, out_features):
        levels = int8_linear(**arguments, out_dtype=torch.int8, output_scale=scale, impl=impl)
        assert levels.dtype == torch.int8
        assert excess_error(levels, exact, scale) <= allowed
        real = int8_linear(**arguments, out_dtype=torch.float32, output_scale=scale, impl=impl)
        assert torch.equal(real, levels.float() * scale)


def test_sums_past_what_float32_holds_are_exact() -> None:
    """As many products as SDXL's widest convolution has, of large odd numbers: float32 sums would round on the way."""
    x, weight = (100 + 2 * (integers(rows, 11_520, seed=rows) % 14) - 1 for rows in (17, 8))
    exact = x.long() @ weight.long().t()
    assert exact.min() > 2**26
    assert not torch.equal(x.float() @ weight.float().t(), exact.float())
    for impl in ("triton", "reference", "int_mm"):
        y = int8_linear(x, weight, 1.0, torch.ones(8), out_dtype=torch.float32, impl=impl)
        assert torch.equal(y, exact.float())


@pytest.mark.parametrize(("with_bias", "with_residual"), [(False, False), (True, False), (False, True)])
def test_optional_terms(with_bias: bool, with_residual: bool, assert_accurate: Any) -> None:
    arguments = inputs((18, 48), 24)
    arguments["bias"] = arguments["bias"] if with_bias else None
    arguments["residual"] = arguments["residual"] if with_residual else None
    for impl in ("triton", "reference", "int_mm"):
        ours = int8_linear(**arguments, out_dtype=torch.float32, impl=impl)
        assert_accurate(ours, torchs(torch.float32, **arguments), formula(**arguments))


@pytest.mark.parametrize("scale", [1e-3, 1e3], ids=["all saturate", "all round to zero"])
def test_saturation(scale: float) -> None:
    arguments = inputs((20, 48), 24)
    exact = formula(**arguments)
    for impl in ("triton", "reference", "int_mm"):
        levels = int8_linear(**arguments, out_dtype=torch.int8, output_scale=scale, impl=impl)
        assert torch.equal(levels, (exact / scale).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("impl", ["triton", "reference", "int_mm"])
def test_nan_has_no_level(impl: str) -> None:
    """In a floating-point result it stays; as a level it is the lowest, as torch's fake quantization has it."""
    arguments = inputs((20, 48), 24)
    arguments["residual"][3, 5] = float("nan")
    y = int8_linear(**arguments, out_dtype=torch.float32, impl=impl)
    assert y.isnan().nonzero().tolist() == [[3, 5]]
    assert int8_linear(**arguments, out_dtype=torch.int8, output_scale=0.1, impl=impl)[3, 5] == -128


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 150), st.booleans(), st.sampled_from(DTYPES),
    st.sampled_from([16, 32]), st.sampled_from([32, 64]),
)  # fmt: skip
def test_any_shape(
    rows: int, out_features: int, in_features: int, with_residual: bool, dtype: torch.dtype, block: int, block_k: int
) -> None:
    arguments = inputs((rows, in_features), out_features, dtype)
    arguments["residual"] = arguments["residual"] if with_residual else None
    config = {"BLOCK_M": block, "BLOCK_N": 32, "BLOCK_K": block_k, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    with use_config("int8_linear", config):
        ours = int8_linear(**arguments, out_dtype=dtype, impl="triton")
    product = formula(**arguments | {"bias": None, "residual": None})
    assert largest_error(ours, formula(**arguments)) <= most_rounding(dtype, product, arguments)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2], id="every other row"),
        pytest.param(lambda x: x[..., 16:48], id="slice of columns"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1), id="expanded batch"),
    ],
)
def test_other_layouts(view: Any) -> None:
    x = view(integers(2, 64, 64))
    arguments = inputs(tuple(x.shape), 24)
    arguments |= {"x": x, "weight": integers(48, x.shape[-1])[::2], "weight_scale": arguments["weight_scale"].flip(0)}
    arguments["residual"] = arguments["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    arguments["bias"] = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).t()[:, 0]
    results = [int8_linear(**arguments, out_dtype=torch.float32, impl=impl) for impl in ("triton", "int_mm")]
    exact = formula(**arguments)
    for ours in results:
        assert largest_error(ours, exact) <= allowed_error(torchs(torch.float32, **arguments), exact)


def test_same_bits_whatever_the_batch() -> None:
    arguments = inputs((3, 40, 64), 24)
    together = int8_linear(**arguments, impl="triton")
    alone = {**arguments, "x": arguments["x"][1:2], "residual": arguments["residual"][1:2]}
    assert torch.equal(together[1:2], int8_linear(**alone, impl="triton"))


def test_opcheck() -> None:
    int8_linear(integers(2, 8), integers(4, 8), 1.0, torch.ones(4), impl="triton")
    op = torch.ops.catimage_accel.int8_linear.default
    a = inputs((3, 5, 16), 6)
    x, weight, scale = a["x"], a["weight"], a["weight_scale"]
    torch.library.opcheck(op, (x, weight, 0.1, scale, a["bias"], a["residual"], torch.float16, None))
    torch.library.opcheck(op, (x.transpose(0, 1), weight, 0.1, scale, None, None, torch.int8, 0.5))
    torch.library.opcheck(op, (x[:0], weight, 0.1, scale, None, None, torch.float32, 0.5))


@pytest.mark.parametrize("impl", ["triton", "reference", "int_mm"])
def test_compiles_whole(impl: str) -> None:
    arguments = inputs((20, 16), 8)
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager")
    ours = compiled(**arguments, out_dtype=torch.float32, impl=impl)
    torch.testing.assert_close(ours, formula(**arguments).float())


GOOD = {"x": torch.zeros(3, 8, dtype=torch.int8), "weight": torch.zeros(4, 8, dtype=torch.int8), "x_scale": 1.0,
        "weight_scale": torch.ones(4)}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x has shape \(3, 8\) and dtype torch.float32; accepted: an int8 \(..., in_feat"),
        ({"x": torch.zeros(3, 0, dtype=torch.int8)}, r"x has shape \(3, 0\)"),
        ({"x": torch.zeros(1, 2**17, dtype=torch.int8)}, r"in_features of 1 to 131071"),
        ({"weight": torch.zeros(4, 7, dtype=torch.int8)}, r"weight has shape \(4, 7\) .*an int8 \(out_features, 8\)"),
        ({"weight": torch.zeros(4, 8)}, r"weight has shape \(4, 8\) and dtype torch.float32"),
        ({"weight": torch.zeros(4, 8, dtype=torch.int8, device="meta")}, r"weight is on meta; accepted: x's device"),
        ({"x_scale": 0.0}, r"x_scale is 0.0; accepted: a finite number above 0 \(amax / 127\)"),
        ({"x_scale": float("nan")}, r"x_scale is nan"),
        ({"x_scale": 1e-44}, r"x_scale is 1e-44"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale has shape \(3,\) .*accepted: a float32 \(4,\)"),
        ({"weight_scale": torch.ones(4).half()}, r"weight_scale has shape \(4,\) and dtype torch.float16"),
        ({"weight_scale": torch.ones(4, device="meta")}, r"weight_scale is on meta"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\); accepted: \(4,\), one per row of weight, or None"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, r"bias has dtype torch.int32; accepted: torch.float16"),
        ({"residual": torch.ones(4)}, r"residual has shape \(4,\); accepted: the result's, \(3, 4\), or None"),
        ({"residual": torch.ones(3, 4, device="meta")}, r"residual is on meta"),
        ({"out_dtype": torch.int32}, r"out_dtype is torch.int32; accepted: torch.float16"),
        ({"out_dtype": torch.int8}, r"output_scale is None; accepted with an out_dtype of torch.int8"),
        ({"output_scale": -1.0}, r"output_scale is -1.0"),
        ({"impl": "cuda"}, r"impl is 'cuda'; accepted: 'reference', 'triton' or None"),
        ({"impl": "int_mm"}, r"weight \(4, 8\); impl 'int_mm' accepts more than 16 rows"),
        ({"impl": "triton", "out_dtype": torch.float64}, r"out_dtype is torch.float64; accepted by impl 'reference'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_linear(**(GOOD | change))
