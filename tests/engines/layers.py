"""Quantized layers of an exported graph, each cut out as a model of its own, beside the torch layers they are of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import shape_inference
from onnx.utils import Extractor

from catimage_accel.quantize.fake import FakeQuantizedConv2d, FakeQuantizedLinear

_OPERATORS = ("Conv", "MatMul", "Gemm")


def quantized_layers(unet: Any) -> dict[str, Any]:
    """The fake-quantized layers of a torch UNet by name."""
    kinds = (FakeQuantizedConv2d, FakeQuantizedLinear)
    return {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}


def cut_out(model: onnx.ModelProto, unet: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Name of each quantized layer, and the part of the graph from its input to its output, both unrounded."""
    model = shape_inference.infer_shapes(model)
    extractor = Extractor(model)
    producer = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for name, module in quantized_layers(unet).items():
        weight = "/unet/" + _scope(name, model) + "/QuantizeLinear_output_0"
        [node] = readers[weight]  # DequantizeLinear
        while node.op_type not in _OPERATORS:
            [node] = readers[node.output[0]]
        [source] = [one for one in node.input if _is_rounded(one, producer)]
        source = producer[producer[source].input[0]].input[0]
        if getattr(module, "input_scale", None) is not None:
            [source] = [
                one for one in producer[source].input if one in producer and producer[one].op_type != "Constant"
            ]
        result = node.output[0]
        if node.op_type == "MatMul" and module.bias is not None:
            [addition] = readers[result]
            result = addition.output[0]
        if module.quantization.output_amax is not None:
            rounding = next(one for one in readers[result] if one.op_type == "QuantizeLinear")
            [back] = readers[rounding.output[0]]
            result = back.output[0]
        yield name, extractor.extract_model([source], [result])


def _is_rounded(name: str, producer: dict[str, Any]) -> bool:
    return name in producer and producer[name].op_type == "DequantizeLinear" and producer[name].input[0] in producer


def _is_constant(name: str, producer: dict[str, Any]) -> bool:
    return bool(producer[name].op_type == "Constant")


def _scope(name: str, model: onnx.ModelProto) -> str:
    """Of the layer's nodes: containers that are never called themselves are joined to their child by a dot."""
    wanted = f"unet.{name}.QuantizeLinear_output_0"
    for tensor in model.graph.initializer:
        if tensor.name.strip("/").replace("/", ".") == wanted:
            return tensor.name.removeprefix("/unet/").removesuffix("/QuantizeLinear_output_0")
    raise AssertionError(f"no quantized weight of {name}")
