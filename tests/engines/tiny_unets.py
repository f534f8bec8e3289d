"""Inputs of the tiny UNet, steps of two engines compared, and scales from the largest values of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from catimage_accel.engines import DeepFeatures, Engine
from catimage_accel.quantize.quantization import LayerQuantization, Quantization, weights_sha256

KEPT = ("conv_in", "conv_out")


def unet_inputs(rows: int, height: int = 16, width: int = 16, tokens: int = 24) -> tuple[torch.Tensor, ...]:
    """Sample, timestep and text of the tiny UNet."""
    generator = torch.Generator().manual_seed(rows)
    sample = torch.randn((rows, 4, height, width), generator=generator)
    return sample, torch.linspace(1, 999, rows), torch.randn((rows, tokens, 32), generator=generator)


def compare(
    actual: Engine, expected: Engine, rows: int, size: tuple[int, int] = (16, 16), deep: DeepFeatures | None = None
) -> None:
    """One step of both."""
    sample, timestep, _ = unet_inputs(rows, *size)
    prompts = [f"{row} dogs" for row in range(rows)]
    results = []
    for engine in (actual, expected):
        text = engine.gather(engine.encode_prompts(prompts))
        own = None if deep is None else DeepFeatures(None if deep.features is None else deep.features.clone())
        if own is not None and deep is not None:
            own.refresh = deep.refresh
        noise = engine.denoise(sample, timestep, text, deep=own)
        assert noise.dtype == torch.float32
        results.append((noise, None if own is None else own.features))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def measured(model: Path, unet: Any, inputs: tuple[Any, ...], *, format: str = "int8") -> Quantization:
    """Of ``model/unet``, loaded as ``unet``: outputs of convolutions too, and every feed-forward smoothed."""
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in KEPT
    }
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(name: str) -> Any:
        return lambda _, args, output: seen.__setitem__(name, (args[0], output))

    handles = [module.register_forward_hook(see(name)) for name, module in layers.items()]
    with torch.no_grad():
        unet(*inputs)
    for handle in handles:
        handle.remove()
    return Quantization(
        format, format, {name: _scales(module, *seen[name], smooth=".ff." in name) for name, module in layers.items()},
        dict.fromkeys(KEPT, "first or last"), weights_sha256(model, "unet"),
    )  # fmt: skip


def _scales(layer: Any, input: torch.Tensor, output: torch.Tensor, *, smooth: bool) -> LayerQuantization:
    scale = torch.linspace(0.5, 2.0, layer.in_features) if smooth else None
    weight = layer.weight.detach()
    if scale is not None:
        weight, input = weight / scale, input * scale
    return LayerQuantization(
        weight.abs().flatten(1).amax(1), input.abs().max(),
        output.abs().max() if isinstance(layer, nn.Conv2d) else None, scale,
    )  # fmt: skip
