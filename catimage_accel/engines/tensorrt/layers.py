"""What a built engine consists of: its layers and the type each computes in, from a build's log or the inspector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from catimage_accel.storage import write_atomic

__all__ = ["LAYERS_FILE", "Layer", "LayerTable", "layers_of_inspector", "layers_of_log"]

LAYERS_FILE = "layers.json"

_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
_TENSOR = re.compile(r"Dimensions: \[(?P<dimensions>[-\d,]*)\].*?Datatype: (?P<type>\w+)")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GRAPH = re.compile(r"^__myl_.*_myl(\d+)_\d+$")  # layers that were fused from others have a number in place of a name
_TYPES = (
    ("INT8", r"int8\b"), ("FP8", r"fp8|float8|e4m3"), ("BF16", r"bf16|bfloat16"), ("FP16", r"half|fp16|float16"),
    ("FP32", r"fp32|float32|float\b"), ("INT32", r"int32"), ("INT64", r"int64"), ("BOOL", r"bool"),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One step of an engine, often many ONNX nodes fused.

    ``inputs`` and ``outputs`` are the types of its activations, ``weights`` that of its largest constant of two
    dimensions or more, None where it has none.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    weights: str | None
    outputs: tuple[str, ...]

    @property
    def profile(self) -> int:
        """The optimization profile that it belongs to, as far as its name tells: 0 unless it names another."""
        match = _PROFILE.search(self.name) or _GRAPH.search(self.name)
        return int(match[1]) if match else 0

    @property
    def multiplies(self) -> bool:
        """It is a convolution or a matrix multiplication with constant weights."""
        return self.weights is not None and self.kind.lower() not in ("kgen", "constant", "cast", "reformat")

    @property
    def precision(self) -> str:
        """The type of what it multiplies: "INT8" only where activation and weights both are.

        Which kernel does so TensorRT-RTX decides on the device.
        """
        first = self.inputs[0] if self.inputs else (self.outputs[0] if self.outputs else "?")
        if not self.multiplies or self.weights == first:
            return first
        return f"{first} x {self.weights}"


@dataclass(frozen=True)
class LayerTable:
    """The layers of an engine, with the quantized weights of the ONNX file that it was built from.

    ``source`` says who told the layers: "log" (the builder's, so no device was needed) or "inspector".
    """

    source: str
    quantized_weights: dict[str, int]
    layers: tuple[Layer, ...]

    def multiplying(self, precision: str | None = None) -> list[Layer]:
        """The convolutions and matrix multiplications of the first profile, or those in one precision."""
        found = [layer for layer in self.layers if layer.multiplies and layer.profile == 0]
        return [layer for layer in found if precision is None or layer.precision == precision]

    def save(self, folder: Path) -> None:
        """Writes layers.json, the inspector's JSON with what it does not tell: Source, QuantizedWeights, Precision."""
        layers = [
            {
                "Name": layer.name, "LayerType": layer.kind, "Precision": layer.precision,
                "Inputs": [{"Format/Datatype": kind} for kind in layer.inputs],
                "Outputs": [{"Format/Datatype": kind} for kind in layer.outputs],
                **({} if layer.weights is None else {"Weights": {"Type": layer.weights}}),
            }
            for layer in self.layers
        ]  # fmt: skip
        record = {"Source": self.source, "QuantizedWeights": self.quantized_weights, "Layers": layers}
        write_atomic(folder / LAYERS_FILE, (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> LayerTable | None:
        """What :meth:`save` wrote; None if there is none."""
        path = folder / LAYERS_FILE
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        return cls(record["Source"], record["QuantizedWeights"], tuple(layers_of_inspector(text)))


def layers_of_log(messages: Iterable[str]) -> list[Layer]:
    """The layers that a builder with detailed verbosity lists at the end of its log."""
    found = []
    for message in messages:
        for line in message.splitlines():
            if (match := _LINE.match(line)) is not None:
                constants = _shapes(match["constants"] or "")
                found.append(
                    Layer(
                        match["name"], match["kind"], tuple(kind for _, kind in _shapes(match["inputs"])),
                        _largest(constants), tuple(kind for _, kind in _shapes(match["outputs"])),
                    )
                )  # fmt: skip
    return found


def layers_of_inspector(text: str) -> list[Layer]:
    """The layers of ``EngineInspector.get_engine_information`` as JSON, of TensorRT 10 and 11.

    An engine built without detailed verbosity has names only, and those have no types.
    """
    found = []
    for entry in json.loads(text).get("Layers", ()):
        if not isinstance(entry, dict):
            found.append(Layer(str(entry), "?", (), None, ()))
            continue
        constants = [(_dimensions(one), _type_of(one)) for one in entry.get("Constants", ())]
        weights = entry.get("Weights")
        own = _type(str(weights.get("Type", ""))) if isinstance(weights, dict) else None
        found.append(
            Layer(
                str(entry.get("Name", "?")), str(entry.get("LayerType", "?")),
                tuple(_type_of(one) for one in entry.get("Inputs", ())), own or _largest(constants),
                tuple(_type_of(one) for one in entry.get("Outputs", ())),
            )
        )  # fmt: skip
    return found


def _shapes(text: str) -> list[tuple[tuple[int, ...], str]]:
    return [
        (tuple(int(size) for size in match["dimensions"].split(",") if size), _type(match["type"]))
        for match in _TENSOR.finditer(text)
    ]


def _largest(constants: Sequence[tuple[tuple[int, ...], str]]) -> str | None:
    """The type of the largest constant that is a matrix or a kernel: biases and scales have one long side at most."""
    matrices = [(prod(shape), kind) for shape, kind in constants if sum(size > 1 for size in shape) >= 2]
    return max(matrices, key=lambda one: one[0])[1] if matrices else None


def _dimensions(tensor: dict[str, Any]) -> tuple[int, ...]:
    return tuple(tensor.get("Dimensions", ()))


def _type_of(tensor: dict[str, Any]) -> str:
    for key in ("DataType", "Datatype", "Format/Datatype", "Format"):
        if key in tensor:
            return _type(str(tensor[key]))
    return "?"


def _type(text: str) -> str:
    return next((name for name, pattern in _TYPES if re.search(pattern, text.lower())), text or "?")
