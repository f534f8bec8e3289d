"""Scales for a UNet's layers, found by NVIDIA ModelOpt on recorded inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from catimage_accel.quantize.inputs import UNetInputs
from catimage_accel.quantize.layers import check_weights, other_layers, quantizable_layers
from catimage_accel.quantize.modelopt import load_modelopt, quiet
from catimage_accel.quantize.quantization import LayerQuantization, Quantization
from catimage_accel.quantize.recipes import Recipe, find_recipe, modelopt_config

__all__ = ["calibrate", "modelopt_quantized"]


def calibrate(
    unet: nn.Module,
    recipe: str,
    batches: Sequence[UNetInputs],
    *,
    source_sha256: str,
    percentile: float = 100.0,
    outputs: bool = True,
    kept: Mapping[str, str] | None = None,
    calibration: Mapping[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Quantization:
    """The scales of every plain Conv2d and Linear of ``unet`` but those in ``kept``; ``unet`` is left as it is.

    Args:
        recipe: "int8", "int8-smoothquant" or "fp8".
        batches: What the UNet is run on, in float32; 1 or more.
        source_sha256: ``weights_sha256`` of the UNet's file.
        percentile: Above 0, up to 100: activations beyond this percentile of their absolute values are clipped; 100
            clips none. Weights are never clipped.
        outputs: Whether layers' outputs are rounded, too.
        kept: Module name -> why it stays in high precision.
        calibration: What ``batches`` are, for the record.
        advance: Called after each batch; there are twice as many with a percentile below 100.

    Raises ValueError for a UNet that can't be quantized and for activations that are not finite; ImportError without
    ModelOpt. Layers that saw nothing but zeros, and kinds of layers that are not quantized, are added to ``kept``.
    """
    found = find_recipe(recipe)
    reasons = dict(kept or {}) | other_layers(unet)
    if unknown := sorted(set(reasons) - dict(unet.named_modules()).keys()):
        raise ValueError(f"kept names {unknown[0]!r}; accepted: names of the UNet's modules")
    model, activations = modelopt_quantized(
        unet, found, batches, percentile=percentile, outputs=outputs, kept=reasons, advance=advance
    )
    layers = {}
    for name in quantizable_layers(unet):
        if name in reasons:
            continue
        amax = activations[name]
        if any(float(value) == 0 for value in amax.values()):
            reasons[name] = "its inputs or outputs were all zero in calibration"
            continue
        layers[name] = _scales(model.get_submodule(name), amax)
    return Quantization(found.format, recipe, layers, reasons, source_sha256, dict(calibration or {}))


def modelopt_quantized(
    unet: nn.Module,
    recipe: Recipe,
    batches: Sequence[UNetInputs],
    *,
    percentile: float = 100.0,
    outputs: bool = True,
    kept: Mapping[str, str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """(ModelOpt's own fake-quantized copy of ``unet``, layer -> "input" or "output" -> amax). See :func:`calibrate`."""
    if not batches:
        raise ValueError("batches is empty; accepted: 1 or more batches of recorded inputs")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; accepted: above 0, up to 100, which clips nothing")
    check_weights(unet)
    names = [name for name in quantizable_layers(unet) if name not in (kept or {})]
    if not names:
        raise ValueError("every layer is kept in high precision; accepted: at least 1 to quantize")
    mtq = load_modelopt()
    model = copy.deepcopy(unet).float()
    _check_activations(model, names, batches[0])

    def forward(model: Any) -> None:
        for batch in batches:
            output = batch.through(model)
            if not bool(torch.isfinite(output).all()):
                raise ValueError("the UNet's output has NaN or infinity; accepted: a UNet that works in float32")
            advance()

    with quiet(), torch.no_grad():
        mtq.quantize(model, modelopt_config(recipe, names, outputs), forward)
        quantizers = {
            name: {
                kind: getattr(model.get_submodule(name), f"{kind}_quantizer")
                for kind in (("input", "output") if outputs else ("input",))
            }
            for name in names
        }
        if percentile < 100:
            _clip(model, [one for both in quantizers.values() for one in both.values()], percentile, forward)
    return model, {name: {kind: one.amax.float() for kind, one in both.items()} for name, both in quantizers.items()}


def _clip(model: nn.Module, quantizers: Sequence[Any], percentile: float, forward: Callable[[Any], None]) -> None:
    """Lowers the amax of ``quantizers`` to that percentile of what they see while nothing is rounded."""
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.nn import TensorQuantizer

    enabled = [one for one in model.modules() if isinstance(one, TensorQuantizer) and one.is_enabled]
    for one in enabled:
        one.disable_quant()
    for one in quantizers:
        one._calibrator = HistogramCalibrator(one.num_bits, None, one.unsigned)
        one.enable_calib()
    forward(model)
    for one in quantizers:
        one.disable_calib()
        clipped = one._calibrator.compute_amax("percentile", percentile=percentile).to(one.amax)
        # A percentile of 0 says that almost all values are 0; those that are not still count.
        if clipped > 0:
            one.amax = clipped.reshape(one.amax.shape).minimum(one.amax)
    for one in enabled:
        one.enable_quant()


def _scales(layer: Any, amax: Mapping[str, Tensor]) -> LayerQuantization:
    weight = layer.weight_quantizer.amax.float().flatten().cpu()
    # One scale for the whole weight (fp8) is one a channel, all the same. A channel of zeros has no scale of its own.
    weight = weight.expand(layer.weight.shape[0]).clone()
    scale = layer.input_quantizer.pre_quant_scale
    return LayerQuantization(
        torch.where(weight == 0, torch.ones(()), weight),
        amax["input"].reshape(()).cpu(),
        amax["output"].reshape(()).cpu() if "output" in amax else None,
        None if scale is None else scale.float().flatten().cpu(),
    )


@torch.no_grad()
def _check_activations(unet: Any, names: Sequence[str], batch: UNetInputs) -> None:
    """ValueError naming the first layer whose output has NaN or infinity."""
    broken: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if not broken and not bool(torch.isfinite(output).all()):
                broken.append(name)

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(look(name)) for name in names]
    try:
        batch.through(unet)
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        raise ValueError(
            f"layer {broken[0]!r} gives NaN or infinity in float32; accepted: a checkpoint that works there"
        )
