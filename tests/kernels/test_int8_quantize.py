"""``int8_quantize``, and the INT8 results of the norms and of GEGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import geglu, group_norm, int8_quantize, layer_norm
from catimage_accel.kernels.accuracy import allowed_error, excess_error

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["triton", "reference", None]
NAN, INF = float("nan"), float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", IMPLS)
def test_halves_go_to_the_even_level_and_what_is_beyond_saturates(impl: str | None) -> None:
    x = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.49, 127.5, 1e30, INF, -127.5, -128.5, -129.0, -INF, 0.49999997]
    levels = [0, 2, 2, 0, -2, -2, 126, 127, 127, 127, 127, -128, -128, -128, -128, 0]
    for scale in (1.0, 0.25, 8.0):
        assert int8_quantize(torch.tensor(x) * scale, scale, impl=impl).tolist() == levels


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_are_those_of_torchs_fake_quantization(impl: str | None, dtype: torch.dtype) -> None:
    x = (40 * normal(3, 70, 33)).to(dtype)
    x[0, 0, 0] = NAN
    scale = torch.tensor(0.37).item()
    fake = torch.fake_quantize_per_tensor_affine(x.float(), scale, 0, -128, 127)
    assert torch.equal(int8_quantize(x, scale, impl=impl).float() * scale, fake)
    assert fake[0, 0, 0] == -128 * scale  # an integer has no NaN


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(1e-6, 1e6), st.sampled_from(DTYPES), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_any_shape(shape: list[int], scale: float, dtype: torch.dtype, last: bool, smooth: bool) -> None:
    x = (200 * scale * normal(*shape)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x
    factors = normal(x.shape[1 if x.ndim == 4 else -1], seed=1).abs() if smooth else None
    arguments = (x, scale)
    ours = int8_quantize(*arguments, input_scale=factors, impl="triton")
    assert torch.equal(ours, int8_quantize(*arguments, input_scale=factors, impl="reference"))
    if x.ndim == 4:
        assert ours.stride() == x.stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_factors_go_by_channel(impl: str | None) -> None:
    factors = torch.tensor([1.0, 2.0, 4.0])
    tokens = int8_quantize(torch.ones(2, 5, 3), 0.5, input_scale=factors, impl=impl)
    assert torch.equal(tokens, torch.tensor([2, 4, 8], dtype=torch.int8).expand(2, 5, 3))
    for x in (torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)):
        image = int8_quantize(x, 0.5, input_scale=factors, impl=impl)
        assert torch.equal(image, torch.tensor([2, 4, 8], dtype=torch.int8)[:, None, None].expand(2, 3, 4, 5))


def test_other_layouts() -> None:
    x = 50 * normal(4, 6, 8, 10)
    views = (x[:, ::2], x[:, :, 1:, ::3], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1), x[0].t() if x[0].ndim == 2
             else x[0].transpose(0, 1))  # fmt: skip
    for view in views:
        assert torch.equal(int8_quantize(view, 1.0, impl="triton"), int8_quantize(view, 1.0, impl="reference"))


def test_opcheck() -> None:
    int8_quantize(torch.ones(2), 1.0, impl="triton")
    op = torch.ops.catimage_accel.int8_quantize.default
    x = normal(2, 3, 4, 5)
    torch.library.opcheck(op, (x, 0.1, None))
    torch.library.opcheck(op, (x.contiguous(memory_format=torch.channels_last), 0.1, torch.ones(3)))
    torch.library.opcheck(op, (x[0].transpose(0, 1)[:0], 0.1, torch.ones(5)))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    x = 50 * normal(3, 8)
    compiled = torch.compile(int8_quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 0.5, impl=impl), int8_quantize(x, 0.5, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.int8)}, r"x has shape \(3,\) and dtype torch.int8; accepted: a floating"),
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"scale": 0.0}, r"scale is 0.0; accepted: a finite number above 0 \(amax / 127\)"),
        ({"scale": NAN}, r"scale is nan"),
        ({"input_scale": torch.ones(2)}, r"input_scale has shape \(2,\) .*accepted: a float32 \(3,\)"),
        ({"input_scale": torch.ones(3).half()}, r"input_scale has shape \(3,\) and dtype torch.float16"),
        ({"input_scale": torch.ones(3, device="meta")}, r"input_scale is on meta; accepted: x's device, cpu"),
        ({"impl": "fast"}, r"impl is 'fast'; accepted: "),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_quantize(**({"x": torch.zeros(2, 3), "scale": 1.0} | change))


def images(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> dict[str, Any]:
    x = normal(*shape).to(dtype)
    return {
        "x": x.contiguous(memory_format=torch.channels_last) if last else x, "num_groups": 4,
        "weight": normal(shape[1], seed=1).to(dtype), "bias": normal(shape[1], seed=2).to(dtype), "activation": "silu",
        "shift": normal(*shape[:2], seed=3).to(dtype),
    }  # fmt: skip


def rows(dtype: torch.dtype, with_residual: bool = False) -> dict[str, Any]:
    x, residual = normal(2, 40, 70).to(dtype), normal(2, 40, 70, seed=3).to(dtype)
    weight, bias = normal(2, 70, seed=1).to(dtype)
    return {"x": x, "weight": weight, "bias": bias} | ({"residual": residual} if with_residual else {})


PRODUCERS: list[Any] = [
    pytest.param(group_norm, lambda dtype: images((2, 20, 9, 7), dtype, False), id="group norm, NCHW"),
    pytest.param(group_norm, lambda dtype: images((2, 20, 9, 7), dtype, True), id="group norm, channels last"),
    pytest.param(group_norm, lambda dtype: images((1, 72, 20, 20), dtype, True), id="group norm, several chunks"),
    pytest.param(group_norm, lambda dtype: images((0, 8, 4, 4), dtype, True), id="group norm, empty batch"),
    pytest.param(layer_norm, rows, id="layer norm"),
    pytest.param(layer_norm, lambda dtype: rows(dtype, True), id="layer norm after a sum"),
    pytest.param(geglu, lambda dtype: {"x": normal(3, 50, 140).to(dtype)}, id="geglu"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "arguments"), PRODUCERS)
def test_producers_round_what_they_would_have_written(
    op: Callable[..., Any], arguments: Callable[..., dict[str, Any]], dtype: torch.dtype, impl: str | None
) -> None:
    """Half a level from the exact result, and no more beyond it than the op errs: differences are at ties only."""
    given, scale = arguments(dtype), 0.02  # values beyond 2.5 saturate

    def first(**changes: Any) -> Tensor:
        result = op(**(given | changes))
        return result[0] if isinstance(result, tuple) else result

    def upcast(to: torch.dtype) -> Tensor:
        return first(**{n: v.to(to) for n, v in given.items() if isinstance(v, Tensor)}, impl="reference")

    levels, exact = first(output_scale=scale, impl=impl), upcast(torch.float64)
    assert (levels.dtype, levels.shape, levels.stride()) == (torch.int8, exact.shape, first(impl=impl).stride())
    # The reference rounds to the dtype first.
    plain = upcast(torch.float32) if impl == "triton" else first(impl="reference")
    assert excess_error(levels, exact, scale) <= allowed_error(plain, exact)
    rounded = int8_quantize(first(impl="reference"), scale)
    difference = (levels.int() - rounded.int()).abs()
    assert levels.numel() == 0 or difference.max() <= 1
    # A value of 127 levels in float16 is off by 1/32 of a level at most, so at most 1 in 16 of them meets a tie.
    assert int((difference > 0).sum()) <= levels.numel() / (1000 if dtype == torch.float32 else 16)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_of_a_layer_norm_is_not_quantized(impl: str | None) -> None:
    given = rows(torch.float32, True)
    _, total = layer_norm(**given, output_scale=0.1, impl=impl)
    assert torch.equal(total, given["x"] + given["residual"])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nan_becomes_the_lowest_level_of_its_group(impl: str) -> None:
    given = images((2, 8, 6, 6), torch.float32, True)
    given["x"][1, 3, 2, 2] = NAN
    levels = group_norm(**given, output_scale=0.02, impl=impl)
    assert (levels[1, 2:4] == -128).all()
    assert not (levels[0] == -128).any()


def test_opcheck_of_producers() -> None:
    x, w = normal(2, 8, 5, 6), torch.ones(8)
    group_norm(x, 4, impl="triton")
    layer_norm(x, impl="triton")
    geglu(x, impl="triton")
    ops = torch.ops.catimage_accel
    torch.library.opcheck(ops.group_norm.default, (x, 4, w, w, 1e-5, True, None, 0.02))
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.group_norm.default, (last, 4, None, None, 1e-5, False, torch.ones(2, 8), 0.02))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, 1e-5, 0.02))
    torch.library.opcheck(ops.add_layer_norm.default, (x, x + 1, None, None, 1e-5, 0.02))
    torch.library.opcheck(ops.geglu.default, (x, 0.02))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [(group_norm, (torch.ones(1, 2, 3), 1)), (layer_norm, (torch.ones(3),)), (geglu, (torch.ones(4),))],
)
def test_bad_output_scales(op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"output_scale is 0.0; accepted: a finite number above 0"):
        op(*arguments, output_scale=0.0)


def test_cuda_kernels_write_no_int8() -> None:
    with pytest.raises(ValueError, match=r"impl is 'cuda'; accepted: 'reference', 'triton' or None"):
        group_norm(torch.ones(1, 2, 3), 1, output_scale=1.0, impl="cuda")
