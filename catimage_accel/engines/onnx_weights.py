"""Quantized weights in an ONNX graph: stored as 8-bit integers (or E4M3) instead of rounded when the graph is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold_quantized_weights", "narrow_weights", "onnx_type", "type_scales"]

_E4M3_MAX = 448.0


def fold_quantized_weights(model: Any) -> int:
    """Replaces every QuantizeLinear of an initializer by an initializer of what it computes; returns how many.

    The DequantizeLinear after it stays, so the graph computes exactly what it did, from a quarter of the bytes.
    ``model`` is an ``onnx.ModelProto``, changed in place. Raises ValueError for a rounding that isn't symmetric.
    """
    from onnx import TensorProto

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    constants = _constants(graph)
    folded: dict[str, Any] = {}
    kept = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in initializers:
            kept.append(node)
            continue
        source = initializers[node.input[0]]
        scale, zero = (
            constants[name] if name in constants else initializers[name] for name in (node.input[1], node.input[2])
        )
        if bool(_tensor(zero).float().any()):
            raise ValueError(f"{node.name} has a zero point other than 0; accepted: symmetric rounding of weights")
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        codes = _codes(_tensor(source), _tensor(scale), axis, zero.data_type == TensorProto.INT8)
        folded[node.output[0]] = _proto(node.output[0], codes, zero.data_type)
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(folded.values())
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    _delete(graph.initializer, lambda tensor: tensor.name not in used)
    _delete(graph.node, lambda node: node.op_type == "Constant" and node.output[0] not in used)
    return len(folded)


def narrow_weights(model: Any) -> int:
    """Halves the 8-bit integers that ``fold_quantized_weights`` stored, and doubles their scales; returns how many.

    They then lie in -64 to 64, so that two products with an unsigned byte fit into 16 bits; an odd one is rounded, to
    even. ``model`` is an ``onnx.ModelProto``, changed in place.
    """
    from onnx import TensorProto

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    constants = _constants(graph)
    narrowed = 0
    for node in graph.node:
        weight = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != TensorProto.INT8:
            continue
        weight.CopyFrom(_proto(weight.name, (_tensor(weight) / 2).round().to(torch.int8), TensorProto.INT8))
        scale = initializers.get(node.input[1], constants.get(node.input[1]))
        assert scale is not None
        # another layer may have the same scale
        doubled = _proto(f"{weight.name}_scale_of_halves", 2 * _tensor(scale), scale.data_type)
        graph.initializer.append(doubled)
        node.input[1] = doubled.name
        narrowed += 1
    return narrowed


def type_scales(model: Any, dtype: torch.dtype) -> None:
    """Makes the scales of every QuantizeLinear and DequantizeLinear ``dtype``: ONNX wants that of what they scale."""
    names = {
        node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }  # fmt: skip
    protos = [tensor for tensor in model.graph.initializer if tensor.name in names]
    protos += [proto for name, proto in _constants(model.graph).items() if name in names]
    for proto in protos:
        scale = _tensor(proto).to(dtype).clamp(min=torch.finfo(dtype).smallest_normal)
        proto.CopyFrom(_proto(proto.name, scale, onnx_type(dtype)))
    # What torch wrote down of the types that follow from the scales is no longer so.
    scaled = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for value in [*model.graph.output, *model.graph.value_info]:
        if value.name in scaled:
            value.type.tensor_type.elem_type = onnx_type(dtype)


def _constants(graph: Any) -> dict[str, Any]:
    """The tensors of Constant nodes, by the name of their output."""
    return {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }


def _codes(weight: Tensor, scale: Tensor, axis: int, integers: bool) -> Tensor:
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[axis] = -1
    scaled = weight.float() / scale.float().view(shape)
    if integers:
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _delete(collection: Any, unwanted: Callable[[Any], bool]) -> None:
    for index in reversed(range(len(collection))):  # in place: a copy of the rest could be gigabytes
        if unwanted(collection[index]):
            del collection[index]


def _tensor(proto: Any) -> Tensor:
    from onnx import TensorProto, numpy_helper

    if proto.data_type == TensorProto.BFLOAT16:
        raw = torch.frombuffer(bytearray(proto.raw_data), dtype=torch.bfloat16)
        return raw.reshape(tuple(proto.dims))
    if proto.data_type == TensorProto.FLOAT8E4M3FN:
        return torch.from_numpy(numpy_helper.to_array(proto).astype("float32"))
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _proto(name: str, value: Tensor, data_type: int) -> Any:
    from onnx import TensorProto

    raw = value.contiguous().view(torch.uint8) if value.ndim else value.reshape(1).view(torch.uint8)
    return TensorProto(name=name, data_type=data_type, dims=value.shape, raw_data=raw.numpy().tobytes())


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number for a floating type."""
    from onnx import TensorProto

    types: dict[torch.dtype, int] = {
        torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
    }  # fmt: skip
    return types[dtype]
