"""``guided_step``: the Triton kernels (in the interpreter) and the reference against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catimage_accel.kernels import guided_step

pytest.importorskip("triton")


def formula(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: Tensor, history: Tensor | None,
    guidance_scale: float | Tensor, guidance_rescale: float | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Image by image, in the words of the docstring."""
    results = []
    for n in range(sample.shape[0]):
        x, eps = sample[n].double(), cond[n].double()
        s, e, h, p, q = coefficients[n].double()
        if uncond is not None:
            g = guidance_scale[n].double() if isinstance(guidance_scale, Tensor) else guidance_scale
            guided = uncond[n].double() + g * (eps - uncond[n].double())
            r = guidance_rescale[n].double() if isinstance(guidance_rescale, Tensor) else guidance_rescale
            rescaled = guided * eps.std() / guided.std() if r else guided
            eps = r * rescaled + (1 - r) * guided
        past = 0 if history is None else h * history[n].double()
        results.append((s * x + e * eps + past, p * x + q * eps))
    stacked = [torch.stack(column) for column in zip(*results, strict=True)] if results else [sample.double()] * 2
    return stacked[0], stacked[1]


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, noise_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, *shape, generator=generator)
    sample, history = tensors[:2].to(dtype)
    cond, uncond = tensors[2:].to(noise_dtype or dtype)
    coefficients = torch.randn(shape[0], 5, generator=generator)
    return {
        "sample": sample, "noise_cond": cond, "noise_uncond": uncond, "coefficients": coefficients, "history": history,
        "guidance_scale": torch.linspace(1, 9, shape[0]), "guidance_rescale": 0.7,
    }  # fmt: skip


def check(arguments: dict[str, Any], impl: str | None, assert_accurate: Any) -> None:
    """Torch's own op is the plain formula in float32, which is the reference: two roundings of the result apart."""
    exact = formula(*arguments.values())
    expected = guided_step(**arguments, impl="reference")
    for ours, plain, true in zip(guided_step(**arguments, impl=impl), expected, exact, strict=True):
        assert_accurate(ours, plain, true)
        torch.testing.assert_close(plain.double(), true, atol=1e-2 if plain.dtype == torch.float16 else 1e-5, rtol=1e-3)
        assert ours.stride() == plain.stride()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 4, 16, 16), id="one block an image"),
        pytest.param((3, 4, 24, 17), id="several blocks, the last one short"),
        pytest.param((5, 3, 1, 1), id="fewer values than lanes"),
        pytest.param((0, 4, 8, 8), id="empty batch"),
        pytest.param((2, 4, 0, 8), id="no pixels"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "noise_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.float16, torch.float16, id="float16"),
        pytest.param(torch.float32, torch.float16, id="float32 latents, float16 UNet"),
    ],
)
def test_accuracy(
    shape: tuple[int, int, int, int], dtype: torch.dtype, noise_dtype: torch.dtype, assert_accurate: Any
) -> None:
    check(inputs(shape, dtype, noise_dtype), "triton", assert_accurate)


@pytest.mark.parametrize("impl", ["triton", "reference", None])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"noise_uncond": None}, id="no guidance"),
        pytest.param({"guidance_scale": 7.5}, id="one scale for all"),
        pytest.param({"guidance_scale": 1}, id="an int scale that changes nothing"),
        pytest.param({"guidance_rescale": 0.0}, id="no rescale"),
        pytest.param({"guidance_rescale": 1}, id="full rescale"),
        pytest.param({"guidance_rescale": torch.tensor([0.0, 0.7])}, id="a rescale for each, none for one"),
        pytest.param({"history": None}, id="first step"),
        pytest.param({"history": None, "noise_uncond": None}, id="first step without guidance"),
    ],
)
def test_options(change: dict[str, Any], impl: str | None, assert_accurate: Any) -> None:
    check(inputs((2, 4, 24, 17)) | change, impl, assert_accurate)


def test_the_sampler_may_be_anything_linear() -> None:
    """Rows [1, 0, 0, 0, 1] keep the sample and hand out the noise."""
    arguments = inputs((2, 4, 8, 8)) | {"guidance_scale": 1.0, "guidance_rescale": 0.0}
    arguments["coefficients"] = torch.tensor([[1.0, 0, 0, 0, 1]] * 2)
    next_sample, denoised = guided_step(**arguments, impl="triton")
    assert torch.equal(next_sample, arguments["sample"])
    torch.testing.assert_close(denoised, arguments["noise_cond"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.floats(1, 15))
def test_any_shape(batch: int, channels: int, height: int, width: int, rescale: float, scale: float) -> None:
    if channels * height * width == 1:
        return  # the standard deviation of one value is NaN in torch
    arguments = inputs((batch, channels, height, width)) | {"guidance_scale": scale, "guidance_rescale": rescale}
    for ours, exact in zip(guided_step(**arguments, impl="triton"), formula(*arguments.values()), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_an_image_does_not_depend_on_its_batch(impl: str) -> None:
    arguments = inputs((3, 4, 24, 17))
    alone = {key: value[1:2] if isinstance(value, Tensor) else value for key, value in arguments.items()}
    for together, single in zip(guided_step(**arguments, impl=impl), guided_step(**alone, impl=impl), strict=True):
        torch.testing.assert_close(together[1:2], single, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_flat_guided_output_is_not_poisoned_by_the_rescale_of_another(impl: str) -> None:
    """Its standard deviation is 0, by which only a row that is rescaled is divided."""
    arguments = inputs((2, 4, 8, 8)) | {"guidance_rescale": torch.tensor([0.0, 0.7])}
    for name in ("noise_cond", "noise_uncond"):
        arguments[name][0] = 0.0
    next_sample, denoised = guided_step(**arguments, impl=impl)
    assert next_sample.isfinite().all()
    assert denoised.isfinite().all()


def test_poison_stays_in_its_image() -> None:
    arguments = inputs((2, 4, 24, 17))
    arguments["noise_cond"][1, 2, 3, 4] = float("nan")
    ours, expected = (guided_step(**arguments, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert ours[0][0].isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels last, kept"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, :, ::2], id="strided"),
        pytest.param(lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
    ],
)
def test_layouts(view: Any) -> None:
    arguments = inputs((2, 4, 8, 6))
    for name in ("sample", "noise_uncond"):
        arguments[name] = view(arguments[name])
    shape = arguments["sample"].shape
    for name in ("noise_cond", "history"):
        arguments[name] = torch.randn(shape)
    ours, expected = (guided_step(**arguments, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_opcheck() -> None:
    guided_step(**inputs((2, 4, 8, 8)), impl="triton")
    op = torch.ops.catimage_accel.guided_step.default
    sample, cond, uncond, coefficients, history, guidance, _ = inputs((2, 4, 8, 8)).values()
    rescale = torch.tensor([0.0, 0.7])
    torch.library.opcheck(op, (sample, cond, uncond, coefficients, history, guidance, rescale))
    torch.library.opcheck(op, (sample.transpose(2, 3), cond, None, coefficients, None, None, None))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole(impl: str) -> None:
    arguments = inputs((2, 4, 8, 8))
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    expected = guided_step(**arguments, impl="reference")
    torch.testing.assert_close(compiled(**arguments, impl=impl), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4)}, r"sample has shape \(2, 4\) .*accepted: a floating-point \(batch, channels"),
        ({"noise_cond": torch.zeros(1, 4, 8, 8)}, r"noise_cond has shape \(1, 4, 8, 8\); accepted: sample's"),
        ({"noise_uncond": torch.zeros(2, 4, 8, 7)}, r"noise_uncond has shape"),
        ({"noise_uncond": torch.zeros(2, 4, 8, 8).half()}, r"noise_uncond has dtype torch.float16; accepted: noise_"),
        ({"history": torch.zeros(2, 4, 8, 8).half()}, r"history has dtype torch.float16; accepted: sample's"),
        ({"history": torch.zeros(2, 4, 8, 8, device="meta")}, r"history is on meta; accepted: sample's device, cpu"),
        ({"coefficients": torch.zeros(2, 4)}, r"coefficients has shape \(2, 4\) .*accepted: \(2, 5\)"),
        ({"coefficients": torch.zeros(2, 5).double()}, r"coefficients has .* dtype torch.float64"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale has shape \(3,\) .*accepted: a number or"),
        ({"guidance_scale": float("inf")}, r"guidance_scale is inf; accepted: a finite number"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1.5; accepted: 0 to 1"),
        ({"guidance_rescale": float("nan")}, r"guidance_rescale is nan"),
        ({"guidance_rescale": torch.ones(2, 1)}, r"guidance_rescale has shape \(2, 1\) .*accepted: a number or"),
        ({"guidance_rescale": torch.ones(2).int()}, r"guidance_rescale has .* dtype torch.int32"),
        ({"impl": 3}, r"impl is 3; accepted: 'reference', 'triton' or None"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided_step(**(inputs((2, 4, 8, 8)) | change))
