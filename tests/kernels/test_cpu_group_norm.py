"""``group_norm`` by the C++ kernels for the CPU, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_group_norm import SHAPES, channels_last, formula, in_other_layouts, inputs, laid_out, shifted, torchs
from torch import Tensor

from catimage_accel.kernels import cpu, group_norm
from catimage_accel.kernels.accuracy import largest_error
from catimage_accel.kernels.build import CPU

pytestmark = pytest.mark.skipif(not cpu.BUILT, reason=f"not built: {CPU.how_to_build}")

LARGE = [
    pytest.param((1, 64, 65, 63), 32, 0.0, id="an image of more values than are read at a time"),
    pytest.param((1, 130, 20, 20), 2, 0.0, id="channels that fill two tiles and a bit"),
    pytest.param((2, 24, 40, 40), 8, 100.0, id="few channels, several pixels taken together"),
    pytest.param((2, 24, 33, 33), 8, 100.0, id="few channels, an odd number of pixels"),
    pytest.param((2, 4100, 3), 4, 0.0, id="a pixel of more values than are read at a time"),
    pytest.param((1, 32, 70, 70), 2, 1000.0, id="a large mean merged over many chunks"),
]
in_layouts = pytest.mark.parametrize("layout", ["NC", "channels last"])
in_dtypes = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@in_dtypes
@in_layouts
@pytest.mark.parametrize(("shape", "groups", "offset"), SHAPES + LARGE)
def test_accuracy(
    shape: tuple[int, ...], groups: int, offset: float, layout: str, dtype: torch.dtype, assert_accurate: Any
) -> None:
    x, weight, bias = inputs(shape, dtype, offset)
    x = laid_out(x, layout)
    shift = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(dtype)
    for activation, added in ((None, None), ("silu", None), ("silu", shift)):
        ours = group_norm(x, groups, weight, bias, activation=activation, shift=added, impl="cpu")
        arguments = (x, groups, weight, bias, 1e-5, activation, added)
        assert_accurate(ours, torchs(*arguments), formula(*arguments))
        assert ours.stride() == x.stride()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.booleans(),
    st.sampled_from(cpu.DTYPES), st.sampled_from([1e-6, 1e-5, 1e-2]), st.sampled_from([None, "silu"]), st.booleans(),
    st.sampled_from([0.0, 3.0, -200.0]),
)  # fmt: skip
def test_any_shape(
    batch: int, groups: int, group_channels: int, height: int, width: int, last: bool, dtype: torch.dtype, eps: float,
    activation: str | None, with_shift: bool, offset: float,
) -> None:  # fmt: skip
    x, weight, bias = inputs((batch, groups * group_channels, height, width), dtype, offset)
    x = channels_last(x) if last else x
    shift = torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(1)).to(dtype) if with_shift else None
    ours = group_norm(x, groups, weight, bias, eps, activation=activation, shift=shift, impl="cpu")
    arguments = (x, groups, weight, bias, eps, activation, shift)
    # Of a few values torch's result may be right to the bit by chance: so the bound is one of its own. It is stricter
    # than the accuracy rule in that it does not grow with the mean.
    magnitude = formula(x, groups, weight, None, eps, None, shift).abs().max() + bias.double().abs().max()
    allowed = (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps) * magnitude
    assert largest_error(ours, formula(*arguments)) <= allowed


@in_dtypes
def test_silu_of_all_magnitudes(dtype: torch.dtype) -> None:
    """Where e^-x overflows the result is 0, and where it vanishes x itself."""
    bias = torch.cat([torch.linspace(-110, 110, 2003), torch.tensor([-1e30, -1e4, -88.8, -87.0, 88.8, 1e4, 1e30])]).to(
        dtype
    )
    x = torch.ones(1, len(bias), 3, dtype=dtype)
    expected = torch.nn.functional.silu(bias.double())
    vanishing = 89 / torch.finfo(torch.float32).max
    for each in (x, channels_last(x)):
        ours = group_norm(each, len(bias), None, bias, activation="silu", impl="cpu").double()
        error = (ours - expected[None, :, None]).abs()
        assert (error <= 4 * torch.finfo(dtype).eps * expected.abs()[None, :, None] + vanishing).all()


@in_dtypes
@in_layouts
def test_same_bits_whatever_the_batch_and_the_threads(
    layout: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    x, weight, bias = inputs((5, 64, 33, 31), dtype)
    x = laid_out(x, layout)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(group_norm(x, 8, weight, bias, activation="silu", impl="cpu"))
        found.append(
            torch.cat([group_norm(x[i : i + 1], 8, weight, bias, activation="silu", impl="cpu") for i in range(5)])
        )
    assert all(torch.equal(found[0], other) for other in found)


@in_dtypes
@in_layouts
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_stays_in_its_group(poison: float, layout: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs((2, 8, 6, 6), dtype)
    x[1, 3, 2, 2] = poison
    ours = group_norm(laid_out(x, layout), 4, weight, bias, activation="silu", impl="cpu")
    assert ours[1, 2:4].isnan().all()
    expected, tolerance = torchs(x, 4, weight, bias, 1e-5, "silu"), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=tolerance, rtol=tolerance)


@in_dtypes
@in_other_layouts
def test_other_layouts(view: Any, dtype: torch.dtype, assert_accurate: Any) -> None:
    x = view(inputs((2, 12, 6, 7), dtype)[0])
    assert_accurate(group_norm(x, 4, impl="cpu"), torchs(x, 4), formula(x, 4))


def test_parameters_that_are_views(assert_accurate: Any) -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    shift = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)).t()[:, ::2]
    arguments = (x, 4, weight.repeat_interleave(2)[::2], bias.flip(0).as_strided((8,), (1,)), 1e-5, None, shift)
    ours = group_norm(*arguments[:5], shift=shift, impl="cpu")
    assert_accurate(ours, torchs(*arguments), formula(*arguments))


def test_a_subclass_and_a_parameter_are_taken_as_tensors() -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    with torch.no_grad():
        ours = group_norm(torch.nn.Parameter(x), 4, torch.nn.Parameter(weight), torch.nn.Parameter(bias), impl="cpu")
    assert torch.equal(ours, group_norm(x, 4, weight, bias, impl="cpu"))


def test_opcheck() -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    group_norm(x, 4, impl="cpu")
    op = torch.ops.catimage_accel_cpu.group_norm.default
    torch.library.opcheck(op, (x, 4, weight, bias, 1e-5, True, None))
    torch.library.opcheck(op, (channels_last(x), 4, None, None, 1e-5, False, torch.randn(8, 2).t()))
    torch.library.opcheck(op, (x.transpose(2, 3)[:0], 4, weight, None, 1e-5, False, None))


@pytest.mark.parametrize(
    ("x", "groups", "weight", "shift", "message"),
    [
        pytest.param(torch.ones(2), 1, None, None, "x must be a CPU tensor", id="1D"),
        pytest.param(torch.ones(2, 8, 3), 3, None, None, "num_groups is 3; it must divide x's 8", id="groups"),
        pytest.param(torch.ones(2, 8, 3), 0, None, None, "num_groups is 0", id="no groups"),
        pytest.param(torch.ones(2, 8, 3).double(), 2, None, None, "float32 or bfloat16", id="dtype"),
        pytest.param(torch.ones(2, 8, 3), 2, torch.ones(7), None, "weight", id="values of weight"),
        pytest.param(torch.ones(2, 8, 3), 2, torch.ones(8).bfloat16(), None, "weight", id="dtype of weight"),
        pytest.param(torch.ones(2, 8, 3), 2, None, torch.ones(8), "shift", id="values of shift"),
    ],
)
def test_the_op_itself_refuses_what_it_cannot_read(
    x: Tensor, groups: int, weight: Tensor | None, shift: Tensor | None, message: str
) -> None:
    group_norm(torch.ones(1, 2, 3), 1, impl="cpu")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.catimage_accel_cpu.group_norm(x, groups, weight, None, 1e-5, False, shift)


@pytest.mark.parametrize(
    ("dtype", "extra", "message"),
    [
        (torch.float16, {}, r"x has dtype torch.float16; impl 'cpu' accepts torch.float32, torch.bfloat16"),
        (torch.float64, {}, r"x has dtype torch.float64; impl 'cpu' accepts"),
        (torch.float32, {"output_scale": 0.1}, r"impl is 'cpu'; accepted: 'reference', 'triton' or None"),
    ],
    ids=["half", "double", "INT8 out"],
)
def test_what_the_cpu_kernels_cannot_do(dtype: torch.dtype, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm(torch.ones(1, 4, 2, dtype=dtype), 2, impl="cpu", **extra)


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BUILT", False)
    message = "impl is 'cpu', but its kernels are not built: python -m catimage_accel.kernels.cpu"
    with pytest.raises(ValueError, match=message):
        group_norm(torch.ones(1, 4, 2), 2, impl="cpu")
    group_norm(channels_last(torch.ones(1, 4, 2, 2)), 2)


def test_compiles_whole() -> None:
    x, weight, bias = inputs((2, 8, 5, 6))
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    ours = compiled(channels_last(x), 4, weight, bias, activation="silu", impl="cpu")
    torch.testing.assert_close(ours, torchs(x, 4, weight, bias, 1e-5, "silu"), atol=1e-5, rtol=1e-5)
    assert ours.stride() == channels_last(x).stride()


@pytest.mark.parametrize(
    ("x", "chosen"),
    [
        pytest.param(channels_last(torch.ones(1, 4, 2, 2)), True, id="channels last"),
        pytest.param(channels_last(torch.ones(1, 4, 2, 2)).double(), False, id="a dtype it lacks"),
        pytest.param(torch.ones(3, 4, 8, 8), False, id="float32 NC"),
        pytest.param(torch.ones(3, 4, 256, 256), True, id="float32 NC, large"),
        pytest.param(torch.ones(3, 4, 16, 16).bfloat16(), True, id="bfloat16 NC"),
        pytest.param(torch.ones(3, 4, 15, 16).bfloat16(), False, id="bfloat16 NC, small"),
    ],
)
def test_chosen_where_it_was_measured_to_be_faster(x: Tensor, chosen: bool) -> None:
    default = group_norm(x, 2, activation="silu")
    impl = "cpu" if chosen else "reference"
    calls: list[Any] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        group_norm(x, 2, activation="silu")
    assert (torch.ops.catimage_accel_cpu.group_norm.default in calls) == chosen
    assert torch.equal(default, group_norm(x, 2, activation="silu", impl=impl))


def test_what_is_compiled_or_traced_sees_torchs_ops() -> None:
    """Who compiles or exports fuses the norm with its neighbours; an op of ours would stand in the way."""
    x = channels_last(torch.ones(1, 4, 8, 8))
    program = torch.export.export(Norm(), (x,))
    traced = torch.jit.trace(Norm(), x)
    assert "catimage_accel" not in str(program.graph) + str(traced.graph)


class Norm(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, 2)


def test_torchs_own_channels_last_kernel_is_less_accurate() -> None:
    """Why ``torchs`` is taken in NC... order, and one reason to have ours."""
    x, weight, bias = inputs((1, 32, 128, 128), offset=3.0)
    exact = formula(x, 4, weight, bias)
    last = channels_last(x)
    theirs = largest_error(torch.group_norm(last, 4, weight, bias), exact)
    assert largest_error(group_norm(last, 4, weight, bias, impl="cpu"), exact) < theirs / 4
    assert shifted(last, None) is last
