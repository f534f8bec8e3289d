"""Convolutions and linear layers that hold INT8 weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catimage_accel.kernels import int8_conv, int8_linear, int8_quantize
from catimage_accel.quantize.quantization import LayerQuantization

__all__ = ["Int8Conv2d", "Int8Linear", "why_not_int8"]

HIGHEST = 127


def why_not_int8(layer: nn.Module) -> str | None:
    """Why the kernels can't take over a layer, if so."""
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"it is a {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d):
        if (layer.dilation, layer.groups, layer.padding_mode) != ((1, 1), 1, "zeros"):
            return f"its dilation is {layer.dilation}, groups {layer.groups}, padding_mode {layer.padding_mode!r}"
        if isinstance(layer.padding, str) or len({*layer.padding}) > 1 or len({*layer.stride}) > 1:
            return f"its padding is {layer.padding!r} and stride {layer.stride}"
    return None


class _Int8Layer(nn.Module):
    """Weights as levels, (out, ...) int8, with the real value of one level a row; float32 scales of in- and output."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, quantization: LayerQuantization) -> None:
        super().__init__()
        weight, scales = layer.weight.detach(), quantization
        factors = scales.input_scale
        if len(scales.weight_amax) != len(weight):
            raise ValueError(f"weight_amax has {len(scales.weight_amax)} values; accepted: {len(weight)}")
        if factors is not None:
            factors = factors.to(weight.device)
            weight = (weight.float() / factors).to(weight.dtype)
        weight_scale = (scales.weight_amax / HIGHEST).to(weight.device)
        # A row a channel, times the reciprocal, as torch's fake quantization has it.
        inverse = (1 / weight_scale).view(-1, *[1] * (weight.ndim - 1))
        levels = (weight.float() * inverse).round().clamp(-HIGHEST - 1, HIGHEST).to(torch.int8)
        self.register_buffer("weight", levels)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("input_scale", factors)
        self.out_dtype = layer.weight.dtype
        self.x_scale: float = (scales.input_amax / HIGHEST).item()
        self.output_scale: float | None = None if scales.output_amax is None else (scales.output_amax / HIGHEST).item()

    def quantized(self, x: Tensor) -> Tensor:
        """``x`` as the layer's levels; what is int8 is that already."""
        return x if x.dtype == torch.int8 else int8_quantize(x, self.x_scale, input_scale=self.input_scale)

    @property
    def takes_residual(self) -> bool:
        """Whether a sum right after the layer may be added by its kernel: its own result is not rounded to levels."""
        return self.output_scale is None


class Int8Linear(_Int8Layer):
    """``nn.Linear`` on INT8."""

    def __init__(self, layer: nn.Linear, quantization: LayerQuantization) -> None:
        if quantization.input_scale is not None and len(quantization.input_scale) != layer.in_features:
            raise ValueError(
                f"input_scale has {len(quantization.input_scale)} values; accepted: {layer.in_features}, one an input"
            )
        super().__init__(layer, quantization)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` is (..., in_features), in floating point or int8 as of ``quantized``; ``residual`` is added."""
        return int8_linear(
            self.quantized(x), self.weight, self.x_scale, self.weight_scale, self.bias, residual=residual,
            out_dtype=self.out_dtype, output_scale=self.output_scale,
        )  # fmt: skip


class Int8Conv2d(_Int8Layer):
    """``nn.Conv2d`` on INT8, in channels-last memory."""

    def __init__(self, layer: nn.Conv2d, quantization: LayerQuantization) -> None:
        if quantization.input_scale is not None:
            raise ValueError("input_scale is given for a Conv2d; accepted: None there")
        super().__init__(layer, quantization)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.stride, self.padding = layer.stride[0], int(layer.padding[0])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` is (batch, channels, height, width), in floating point or int8; ``residual`` is added."""
        return int8_conv(
            self.quantized(x), self.weight, self.x_scale, self.weight_scale, self.bias, stride=self.stride,
            padding=self.padding, residual=residual, out_dtype=self.out_dtype, output_scale=self.output_scale,
        )  # fmt: skip
