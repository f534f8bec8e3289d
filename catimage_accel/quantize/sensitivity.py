"""What quantizing each layer does to the UNet's output, and which layers that makes worth an exception."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from catimage_accel.quantize.fake import fake_layer, fake_quantized
from catimage_accel.quantize.inputs import UNetInputs
from catimage_accel.quantize.quantization import Quantization

__all__ = ["keep_sensitive", "layer_errors", "output_error"]

# A layer with less than this share of all layers' errors stays quantized, however cheap it is to keep.
WORTHWHILE = 1e-3


def layer_errors(
    unet: Any, quantization: Quantization, batches: Sequence[UNetInputs], advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Module name -> relative squared error of the UNet's output, over all ``batches``, with only it quantized.

    Layers are replaced in ``unet`` one at a time and put back. ``advance`` is called after each.
    """
    expected = [batch.through(unet) for batch in batches]
    errors = {}
    for name, scales in quantization.layers.items():
        parent, _, own = name.rpartition(".")
        holder, layer = unet.get_submodule(parent), unet.get_submodule(name)
        setattr(holder, own, fake_layer(name, layer, scales, quantization.format))
        try:
            errors[name] = _relative([batch.through(unet) for batch in batches], expected)
        finally:
            setattr(holder, own, layer)
        advance()
    return errors


def output_error(unet: nn.Module, quantization: Quantization, batches: Sequence[UNetInputs]) -> float:
    """Relative squared error of the UNet's output over ``batches`` with all of ``quantization``."""
    quantized = fake_quantized(unet, quantization)
    return _relative([batch.through(quantized) for batch in batches], [batch.through(unet) for batch in batches])


def keep_sensitive(
    quantization: Quantization, errors: Mapping[str, float], multiply_adds: Mapping[str, int], total: int, budget: float
) -> Quantization:
    """``quantization`` without the layers whose errors are largest for their multiply-adds.

    They are taken greedily while they fit into ``budget``, the share of the UNet's ``total`` multiply-adds, 0 to 1,
    that may stay in high precision. Layers of next to no error are not worth it and stay quantized.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget}; accepted: 0 to 1, the share of multiply-adds in high precision")
    everything = sum(errors[name] for name in quantization.layers)
    kept, left = {}, budget * total
    for name in sorted(quantization.layers, key=lambda name: -errors[name] / max(1, multiply_adds[name])):
        if errors[name] >= WORTHWHILE * everything and multiply_adds[name] <= left and budget > 0:
            left -= multiply_adds[name]
            kept[name] = f"sensitive: {errors[name] / everything:.1%} of all layers' errors"
    if len(kept) == len(quantization.layers):
        raise ValueError(f"budget is {budget}, which leaves no layer to quantize; accepted: less")
    return replace(
        quantization,
        layers={name: scales for name, scales in quantization.layers.items() if name not in kept},
        kept={**quantization.kept, **kept},
        errors=dict(errors),
    )


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    error = sum(float((one - other).double().square().sum()) for one, other in zip(found, expected, strict=True))
    return error / sum(float(other.double().square().sum()) for other in expected)
