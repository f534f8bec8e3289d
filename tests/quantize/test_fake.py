"""Fake quantization against its definition, in PyTorch, under torch.compile and through ONNX."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_parts import random_inputs
from torch import Tensor, nn

from catimage_accel.quantize import (
    FakeQuantizedConv2d,
    FakeQuantizedLinear,
    LayerQuantization,
    Quantization,
    fake_quantized,
)
from catimage_accel.quantize.fake import quantize_dequantize


def scales(layer: nn.Conv2d | nn.Linear, **changed: Any) -> LayerQuantization:
    weight_amax = layer.weight.detach().abs().flatten(1).amax(1)
    return LayerQuantization(**{"weight_amax": weight_amax, "input_amax": torch.tensor(2.0), **changed})


def int8(x: Tensor, amax: Tensor) -> Tensor:
    return (x.double() * 127 / amax.double()).round().clamp(-128, 127) * amax.double() / 127


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-3, 1e4), st.integers(0, 10**6), st.floats(0.1, 3.0))
def test_int8_is_its_definition(amax: float, seed: int, spread: float) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed)) * amax * spread
    place = x.double() * 127 / amax
    tie = ((place - place.floor()) - 0.5).abs() < 1e-4 * place.abs().clamp(min=1)
    found = quantize_dequantize(x, amax, "int8")
    expected = int8(x, torch.tensor(amax))
    torch.testing.assert_close(found[~tie].double(), expected[~tie], rtol=1e-5, atol=0)
    assert (found[tie] - expected[tie]).abs().max() <= amax / 127 * 1.001 if tie.any() else True
    assert torch.equal(quantize_dequantize(found, amax, "int8"), found)  # rounding twice is rounding once


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-3, 1e4), st.integers(0, 10**6))
def test_fp8_rounds_to_three_bits_and_saturates(amax: float, seed: int) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed)) * amax
    found = quantize_dequantize(x, amax, "fp8")
    assert found.abs().max() <= amax * (1 + 1e-6)
    inside = (x.abs() <= amax) & (x.abs() * 448 / amax >= 2**-6)  # the rest is clipped or subnormal
    assert ((found - x).abs() <= x.abs() * (2**-4 + 1e-6))[inside].all()
    torch.testing.assert_close(quantize_dequantize(found, amax, "fp8"), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_are_rounded_by_their_own_scales(format: str) -> None:
    x = torch.randn(3, 5, 2)
    amax = torch.tensor([0.5, 2.0, 30.0])
    rows = torch.stack([quantize_dequantize(row, float(top), format) for row, top in zip(x, amax, strict=True)])
    torch.testing.assert_close(quantize_dequantize(x, amax, format), rows, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [
    pytest.param((nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 7)), id="padded conv"),
    pytest.param((nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False), (2, 4, 9, 9)), id="strided grouped conv"),
    pytest.param((nn.Conv2d(4, 6, 1, dilation=1, padding_mode="circular"), (1, 4, 5, 5)), id="circular conv"),
    pytest.param((nn.Linear(6, 5), (2, 7, 6)), id="linear"),
    pytest.param((nn.Linear(6, 5, bias=False), (3, 6)), id="linear without bias"),
])  # fmt: skip
@pytest.mark.parametrize("outputs", [False, True])
def test_layer_is_its_definition(case: tuple[nn.Conv2d | nn.Linear, tuple[int, ...]], outputs: bool) -> None:
    layer, shape = case
    kind = FakeQuantizedLinear if isinstance(layer, nn.Linear) else FakeQuantizedConv2d
    smooth = {"input_scale": torch.linspace(0.5, 2, 6)} if isinstance(layer, nn.Linear) else {}
    x = torch.randn(shape)
    plain, given_x = copy.deepcopy(layer), x
    if smooth:
        plain.weight.data = layer.weight.detach() / smooth["input_scale"]
        given_x = x * smooth["input_scale"]
    found_scales = scales(plain, output_amax=torch.tensor(0.7) if outputs else None, **smooth)
    top = found_scales.weight_amax.view(-1, *[1] * (layer.weight.ndim - 1))
    plain.weight.data = int8(plain.weight.detach(), top).float()
    expected = plain(int8(given_x, found_scales.input_amax).float())
    if outputs:
        expected = int8(expected, torch.tensor(0.7)).float()
    found = kind(layer, found_scales)(x)  # type: ignore[arg-type]
    # A sum on the edge between two output steps may fall either way.
    tolerance = 0.7 / 127 * 1.01 if outputs else 1e-5
    assert (found - expected).abs().max() < tolerance
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.99


def test_unet_is_copied_and_only_named_layers_round(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    inputs = random_inputs(2)
    before = inputs.through(unet)
    weights = copy.deepcopy(unet.state_dict())
    nothing = fake_quantized(unet, replace(calibrated(), layers={}))
    assert torch.equal(inputs.through(nothing), before)
    one = fake_quantized(unet, replace(calibrated(), layers={"conv_in": calibrated().layers["conv_in"]}))
    assert isinstance(one.conv_in, FakeQuantizedConv2d)
    assert one.conv_in.quantization is calibrated().layers["conv_in"]
    assert type(one.conv_out) is nn.Conv2d
    assert not torch.equal(inputs.through(one), before)
    assert torch.equal(inputs.through(unet), before)
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(("layers", "said"), [
    pytest.param(lambda unet: {"conv_on": scales(unet.conv_in)}, "no layer 'conv_on'", id="no such layer"),
    pytest.param(lambda unet: {"conv_norm_out": scales(unet.conv_in)}, "is a GroupNorm", id="not a matrix product"),
    pytest.param(lambda unet: {"conv_in": scales(unet.conv_out)}, "weight_amax has 4 values; accepted: 16", id="size"),
    pytest.param(
        lambda unet: {"conv_in": scales(unet.conv_in, input_scale=torch.ones(4))}, "input_scale is given", id="smooth"
    ),
    pytest.param(
        lambda unet: {"time_embedding.linear_1": scales(unet.time_embedding.linear_1, input_scale=torch.ones(3))},
        "input_scale has 3 values; accepted: 16", id="smoothing of another size",
    ),
])  # fmt: skip
def test_scales_of_another_unet_are_refused(unet: Any, layers: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fake_quantized(unet, Quantization("int8", "int8", layers(unet), {}, "a" * 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["int8-smoothquant", "fp8"])
def test_half_precision_rounds_alike(
    unet: Any, calibrated: Callable[..., Quantization], recipe: str, dtype: torch.dtype
) -> None:
    inputs, exact = random_inputs(2), fake_quantized(unet, calibrated(recipe))
    half = copy.deepcopy(exact).to(dtype)
    assert half.conv_in.weight.dtype == dtype
    found, expected, plain = inputs.through(half), inputs.through(exact), inputs.through(unet)
    own = (expected - plain).square().mean()
    assert (found - plain).square().mean() < 3 * own


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_traces_without_a_break(format: str) -> None:
    conv, linear = nn.Conv2d(4, 6, 3).requires_grad_(False), nn.Linear(6, 5).requires_grad_(False)
    smooth = {"output_amax": torch.tensor(1.5), "input_scale": torch.linspace(0.5, 2, 6)}
    first = FakeQuantizedConv2d(conv, scales(conv), format)
    second = FakeQuantizedLinear(linear, scales(linear, **smooth), format)

    def both(x: Tensor) -> Tensor:
        return second(first(x).movedim(1, -1))

    torch._dynamo.reset()
    traced = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 3):
        x = torch.randn(rows, 4, 6, 6, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(traced(x), both(x), rtol=1e-5, atol=1e-6)


class _OnlyTensors(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(sample, timestep, text, return_dict=False)[0]


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    content = io.BytesIO()
    names = ["a", "b", "c"][: len(inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, inputs, content, dynamo=False, opset_version=20, input_names=names, output_names=["out"],
            dynamic_axes={name: {0: "rows"} for name in [*names, "out"]},
        )  # fmt: skip
    return content.getvalue()


def as_written(content: bytes) -> Any:
    """A session that fuses nothing: what is fused, and how it rounds on which processor, is the engines' business."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(content, options)


@pytest.mark.parametrize("outputs", [False, True])
def test_unet_exports_every_rounding(unet: Any, calibrated: Callable[..., Quantization], outputs: bool) -> None:
    onnx = pytest.importorskip("onnx")
    quantization = calibrated("int8", outputs=outputs)
    quantized, inputs = fake_quantized(unet, quantization), random_inputs(2)
    content = exported(_OnlyTensors(quantized), (inputs.sample, inputs.timestep, inputs.encoder_hidden_states))
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    made_by = {name: node for node in model.graph.node for name in node.output}
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"]
    per_channel = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.attribute]
    assert len(per_channel) == len(quantization.layers)
    # Layers with the same input share its rounding.
    activations, layers = counts["QuantizeLinear"] - len(per_channel), len(quantization.layers)
    assert layers * (outputs + 0.7) < activations <= layers * (outputs + 1)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(type(module) is nn.Conv2d for module in unet.modules())
    assert {made_by[name].op_type for node in convolutions for name in node.input[:2]} == {"DequantizeLinear"}
    if outputs:
        users = [node for node in model.graph.node for name in node.input if made_by.get(name) in convolutions]
        assert {node.op_type for node in users} == {"QuantizeLinear"}
    more, plain = random_inputs(5, seed=1), unet
    session = as_written(content)
    feeds = {"a": more.sample.numpy(), "b": more.timestep.numpy(), "c": more.encoder_hidden_states.numpy()}
    found = torch.from_numpy(session.run(None, feeds)[0])
    # Ties cascade through a random UNet, so not the outputs agree but how far they are from the unquantized one's.
    reference = more.through(plain)
    own = (more.through(quantized) - reference).square().mean()
    assert 0.8 < (found - reference).square().mean() / own < 1.25


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, padding=1), nn.Linear(4, 8)], ids=["conv", "linear"])
def test_layer_runs_alike_in_onnx_runtime(layer: nn.Conv2d | nn.Linear) -> None:
    kind = FakeQuantizedLinear if isinstance(layer, nn.Linear) else FakeQuantizedConv2d
    made = kind(layer.requires_grad_(False), scales(layer))  # type: ignore[arg-type]
    session = as_written(exported(made, (torch.randn(2, 4, 4, 4),)))
    x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    found = torch.from_numpy(session.run(None, {"a": x.numpy()})[0])
    torch.testing.assert_close(found, made(x), rtol=1e-5, atol=1e-5)


def test_fp8_exports_as_float8() -> None:
    onnx = pytest.importorskip("onnx")
    layer = nn.Conv2d(4, 8, 3).requires_grad_(False)
    made = FakeQuantizedConv2d(layer, scales(layer), "fp8")
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(exported(made, (torch.randn(1, 4, 6, 6),))))
    onnx.checker.check_model(model)
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    assert len(quantized) == 2
    assert {types[name] for name in quantized} == {onnx.TensorProto.FLOAT8E4M3FN}
