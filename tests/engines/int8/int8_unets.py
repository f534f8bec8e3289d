"""UNets with scales, for the tests of what runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from catimage_accel.engines import DeepFeatures, EagerEngine
from catimage_accel.quantize.fake import fake_layer
from catimage_accel.quantize.layers import quantizable_layers
from catimage_accel.quantize.quantization import LayerQuantization, Quantization

KEPT = {"conv_in": "first convolution", "conv_out": "last convolution"}
PROMPTS = ["a dog", ""]


def noise(rows: int, side: int = 16) -> Tensor:
    return torch.randn((rows, 4, side, side), generator=torch.Generator().manual_seed(rows))


def denoised(engine: EagerEngine, rows: int = 2, deep: DeepFeatures | None = None) -> Tensor:
    text = engine.gather(engine.encode_prompts(PROMPTS[:rows]))
    return engine.denoise(noise(rows), torch.tensor([901.0, 13.0][:rows]), text, deep=deep)


def measured_layers(
    engine: EagerEngine, *, outputs: bool, smooth: bool, separate_heads: bool
) -> dict[str, LayerQuantization]:
    """Scales from what the layers see of real inputs: largest absolute values, as calibration by maximum has it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: layer for name, layer in quantizable_layers(engine.unet).items() if name not in KEPT}

    def see(name: str) -> Callable[..., None]:
        return lambda _, arguments, y: seen.__setitem__(name, (arguments[0].detach(), y.detach()))

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in layers.items():
        x, y = seen[name]
        factors = None
        if smooth and isinstance(layer, nn.Linear):
            # The same for projections that share an input, or each its own, as SmoothQuant's would be.
            own = generator if separate_heads else torch.Generator().manual_seed(layer.in_features)
            factors = 0.5 + torch.rand(layer.in_features, generator=own)
            x = x * factors
        weight = layer.weight if factors is None else layer.weight / factors
        found[name] = LayerQuantization(
            weight.flatten(1).abs().amax(1).float(), x.abs().max().float() * 0.9,  # some inputs saturate
            y.abs().max().float() if outputs else None, factors,
        )  # fmt: skip
    return found


def with_fake_unet(folder: Path, quantization: Path) -> EagerEngine:
    """The eager engine over the UNet that rounds in floating point."""
    engine = EagerEngine(folder)
    for name, scales in Quantization.load(quantization).layers.items():
        parent, _, own = name.rpartition(".")
        layer = engine.unet.get_submodule(name)
        setattr(engine.unet.get_submodule(parent), own, fake_layer(name, layer, scales, "int8"))
    return engine


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def layer_inputs(engine: EagerEngine) -> dict[str, Tensor]:
    """What each Conv2d and Linear sees in a denoising step."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].detach()))
        for name, layer in quantizable_layers(engine.unet).items()
    ]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    return seen


