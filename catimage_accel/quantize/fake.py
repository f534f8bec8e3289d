"""Fake quantization: a UNet in floating point whose layers round as the quantized engines will. Needs no ModelOpt."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from catimage_accel.quantize.quantization import LayerQuantization, Quantization

__all__ = ["FakeQuantizedConv2d", "FakeQuantizedLinear", "fake_layer", "fake_quantized", "quantize_dequantize"]

INT8_MAX, E4M3_MAX = 127, 448.0
UNet = TypeVar("UNet", bound=nn.Module)


def fake_quantized(unet: UNet, quantization: Quantization) -> UNet:
    """A copy of ``unet`` whose layers named in ``quantization`` round weights, inputs and (where asked for) outputs.

    It runs in float32, bfloat16 or float16, traces under ``torch.compile``, and ``torch.onnx.export(dynamo=False,
    opset_version=20)`` writes each rounding as QuantizeLinear and DequantizeLinear, weights included.

    ValueError if a layer is missing or is not the plain Conv2d or Linear that its scales fit.
    """
    copied = copy.deepcopy(unet)
    for name, layer in quantization.layers.items():
        try:
            module = copied.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the UNet has no layer {name!r}; the quantization was made from another one") from None
        parent, _, own = name.rpartition(".")
        setattr(copied.get_submodule(parent), own, fake_layer(name, module, layer, quantization.format))
    return copied


def fake_layer(name: str, module: nn.Module, quantization: LayerQuantization, format: str) -> nn.Module:
    """``module``, which is called ``name``, with roundings. ValueError as of :func:`fake_quantized`."""
    kind: Any = {nn.Conv2d: FakeQuantizedConv2d, nn.Linear: FakeQuantizedLinear}.get(type(module))
    if kind is None:
        raise ValueError(f"layer {name!r} is a {type(module).__name__}; accepted: Conv2d, Linear")
    try:
        return kind(module, quantization, format)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None


class FakeQuantizedConv2d(nn.Conv2d):
    """A Conv2d with rounded weights that rounds its input and, with ``output_amax``, its output."""

    def __init__(self, layer: nn.Conv2d, quantization: LayerQuantization, format: str = "int8") -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        if quantization.input_scale is not None:
            raise ValueError("input_scale is given for a Conv2d; accepted: None there")
        self._rounding = _adopt(self, layer, layer.weight, quantization, format)
        self.quantization = quantization

    def forward(self, input: Tensor) -> Tensor:
        rounding = self._rounding
        weight = rounding.weight(self.weight) if torch.onnx.is_in_onnx_export() else self.weight
        return rounding.output(self._conv_forward(rounding.input(input), weight, self.bias))


class FakeQuantizedLinear(nn.Linear):
    """A Linear with rounded weights that rounds its input and, with ``output_amax``, its output."""

    input_scale: Tensor | None

    def __init__(self, layer: nn.Linear, quantization: LayerQuantization, format: str = "int8") -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        scale = quantization.input_scale
        weight = layer.weight
        if scale is not None:
            if len(scale) != layer.in_features:
                raise ValueError(f"input_scale has {len(scale)} values; accepted: {layer.in_features}, one an input")
            weight = (weight.float() / scale.to(weight.device)).to(weight.dtype)
            scale = scale.to(weight)
        self._rounding = _adopt(self, layer, weight, quantization, format)
        self.register_buffer("input_scale", scale, persistent=False)
        self.quantization = quantization

    def forward(self, input: Tensor) -> Tensor:
        rounding = self._rounding
        if self.input_scale is not None:
            input = input * self.input_scale
        weight = rounding.weight(self.weight) if torch.onnx.is_in_onnx_export() else self.weight
        return rounding.output(nn.functional.linear(rounding.input(input), weight, self.bias))


class _Rounding:
    """The roundings of one layer; scales are numbers, which a change of the module's dtype leaves alone."""

    def __init__(self, quantization: LayerQuantization, format: str) -> None:
        self.format = format
        self.weight_amax = quantization.weight_amax
        self.input_amax = quantization.input_amax.item()
        self.output_amax = None if quantization.output_amax is None else quantization.output_amax.item()

    def weight(self, weight: Tensor) -> Tensor:
        return quantize_dequantize(weight, self.weight_amax.to(weight.device), self.format)

    def input(self, input: Tensor) -> Tensor:
        return quantize_dequantize(input, self.input_amax, self.format)

    def output(self, output: Tensor) -> Tensor:
        return output if self.output_amax is None else quantize_dequantize(output, self.output_amax, self.format)


def _adopt(
    new: nn.Conv2d | nn.Linear, layer: nn.Conv2d | nn.Linear, weight: Tensor, quantization: LayerQuantization,
    format: str,
) -> _Rounding:  # fmt: skip
    """Gives ``new`` the parameters of ``layer``, the weight rounded once for all."""
    if len(quantization.weight_amax) != len(weight):
        raise ValueError(f"weight_amax has {len(quantization.weight_amax)} values; accepted: {len(weight)}")
    rounding = _Rounding(quantization, format)
    rounded = rounding.weight(weight.detach().float()).to(weight.dtype)
    new.weight = nn.Parameter(rounded, requires_grad=False)
    new.bias = layer.bias
    new.train(layer.training)
    return rounding


def quantize_dequantize(x: Tensor, amax: Tensor | float, format: str) -> Tensor:
    """``x`` rounded to "int8" or "fp8" and back; ``amax`` is a number, or (x.shape[0],), one a row."""
    if format == "int8":
        if isinstance(amax, Tensor):
            zero_points = torch.zeros(len(amax), dtype=torch.int32, device=amax.device)
            return torch.fake_quantize_per_channel_affine(x, amax / INT8_MAX, zero_points, 0, -128, INT8_MAX)
        return torch.fake_quantize_per_tensor_affine(x, amax / INT8_MAX, 0, -128, INT8_MAX)
    if torch.onnx.is_in_onnx_export():
        steps = amax / E4M3_MAX if isinstance(amax, Tensor) else torch.tensor(amax / E4M3_MAX)
        return _E4M3.apply(x, steps)
    if isinstance(amax, Tensor):
        amax = amax.view(-1, *[1] * (x.ndim - 1))
    return _e4m3(x, amax / E4M3_MAX)


def _e4m3(x: Tensor, step: Tensor | float) -> Tensor:
    # In float32: at 448 float16 and bfloat16 have steps of their own, and the cast does not saturate.
    scaled = (x.float() / step).clamp(-E4M3_MAX, E4M3_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() * step).to(x.dtype)


class _E4M3(torch.autograd.Function):
    """Rounding to E4M3 as the ONNX exporter is to see it: QuantizeLinear and DequantizeLinear with a float8 type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor) -> Tensor:
        return _e4m3(x, steps.view(-1, *[1] * (x.ndim - 1)) if steps.ndim else steps)

    @staticmethod
    def symbolic(g: Any, x: Any, steps: Any) -> Any:
        per_channel = steps.type().dim() == 1
        axis = {"axis_i": 0} if per_channel else {}
        zeros = torch.zeros(steps.type().sizes() if per_channel else ())
        zero_point = g.op("Cast", g.op("Constant", value_t=zeros), to_i=17)  # FLOAT8E4M3FN
        quantized = g.op("QuantizeLinear", x, steps, zero_point, **axis)
        return g.op("DequantizeLinear", quantized, steps, zero_point, **axis).setType(x.type())
