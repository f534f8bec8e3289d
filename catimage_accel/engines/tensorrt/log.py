"""What the libraries say while they build and run."""

from __future__ import annotations

import re
from math import prod
from typing import Any

from catimage_accel.engines.tensorrt.layers import Layer, layers_of_log

__all__ = ["Log", "listener"]

_QUANTIZED = re.compile(
    r"\[DequantizeLinear\] inputs: \[(?P<name>\S+) -> \((?P<shape>\d[\d, ]*)\)\[(?P<type>INT8|FP8|FLOAT8E4M3FN)\]\]"
)
_ERRORS = ("INTERNAL_ERROR", "ERROR")


class Log:
    """All messages of one build or one runtime, verbose ones too, with what can be learnt from them."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []

    def record(self, severity: str, message: str) -> None:
        self.messages.append((severity, message))

    def reason(self) -> str:
        """The first error in one line; "it did not say why" if there is none."""
        for severity, message in self.messages:
            if severity in _ERRORS:
                return " ".join(message.split())
        return "it did not say why"

    def layers(self) -> list[Layer]:
        """The engine's layers, listed at the end of a build with detailed verbosity."""
        return layers_of_log(text for severity, text in self.messages if severity == "VERBOSE" and "LayerType" in text)

    def quantized_weights(self) -> dict[str, int]:
        """Initializers that the parser read as INT8 or FP8 and hands to a DequantizeLinear: name -> elements.

        Activations have a dynamic first dimension, scalars none; so what is left are weights.
        """
        found = {}
        for _, text in self.messages:
            for match in _QUANTIZED.finditer(text):
                shape = [int(size) for size in match["shape"].split(",") if size.strip()]
                if len(shape) >= 2:
                    found[match["name"]] = prod(shape)
        return found


def listener(trt: Any, log: Log) -> Any:
    """An ``ILogger`` of the library ``trt`` that hands every message to ``log``. Keep it while the library uses it."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.record(severity.name, message)

    return Listener()
