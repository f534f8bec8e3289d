"""What is inside the files of an entry: ONNX graphs, and the layers that TensorRT's engine inspector lists."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The words for types in TensorRT's formats: "Half", "Thirty-two wide channel vectorized row major Int8 format."
_PRECISIONS = {
    "int8": "int8", "fp8": "fp8", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "half": "fp16", "fp32": "fp32",
    "float": "fp32", "int64": "int64", "int32": "int32", "bool": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class GraphDescription:
    """``operators``: operator -> number of its nodes; ``tensors``: (input or output, name, type, shape) in words."""

    operators: Counter[str]
    tensors: list[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Layer:
    """A layer of a TensorRT engine; ``inputs`` and ``outputs`` are the precisions it takes and gives, "-": untold."""

    name: str
    kind: str
    inputs: str
    outputs: str


def describe_graph(path: Path) -> GraphDescription:
    """The nodes (those of subgraphs and functions too) and the inputs and outputs of an ONNX file.

    Raises ImportError without onnx, ValueError for a file that is no ONNX model. Weights in other files are not read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model: {error}") from None
    operators: Counter[str] = Counter()
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while nodes:
        node = nodes.pop()
        operators[node.op_type] += 1
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                nodes += graph.node
    weights = {tensor.name for tensor in model.graph.initializer}
    tensors = [("input", *_typed(value)) for value in model.graph.input if value.name not in weights]
    return GraphDescription(operators, [*tensors, *(("output", *_typed(value)) for value in model.graph.output)])


def read_layers(path: Path) -> list[Layer]:
    """The layers in TensorRT's engine inspector's JSON; none if the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    layers = found.get("Layers") if isinstance(found, dict) else None
    return [_layer(layer) for layer in layers] if isinstance(layers, list) else []


def _layer(layer: Any) -> Layer:
    if not isinstance(layer, dict):  # engines built without details list names alone
        return Layer(str(layer), "-", "-", "-")
    name, kind = (str(layer.get(field, "-")) for field in ("Name", "LayerType"))
    return Layer(name, kind, _precisions(layer.get("Inputs")), _precisions(layer.get("Outputs")))


def _precisions(tensors: Any) -> str:
    """The different precisions of a layer's tensors, in their order."""
    found = {}
    for tensor in tensors if isinstance(tensors, list) else []:
        text = str(tensor.get("Format/Datatype", "-")) if isinstance(tensor, dict) else "-"
        words = text.lower().split()
        found[next((name for word, name in _PRECISIONS.items() if word in words), text)] = True
    return ", ".join(found) or "-"


def _typed(value: Any) -> tuple[str, str, str]:
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = [part.dim_param or (str(part.dim_value) if part.HasField("dim_value") else "?") for part in kind.shape.dim]
    return value.name, TensorProto.DataType.Name(kind.elem_type).lower(), " x ".join(shape) or "scalar"
