"""What the tests of ``accelerate`` compare."""

from __future__ import annotations

from typing import Any

import torch

PARTS = ("unet", "vae", "controlnet", "text_encoder", "text_encoder_2")


def draw(pipe: Any, *, steps: int = 3, **arguments: Any) -> torch.Tensor:
    """A picture from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a red cat", num_inference_steps=steps, generator=generator, output_type="pt", **arguments).images


def state(pipe: Any) -> dict[str, Any]:
    """Every object that ``accelerate`` may touch, by identity, with its class and its attributes."""
    found: dict[str, Any] = {}
    for root, component in ((root, getattr(pipe, root)) for root in PARTS if hasattr(pipe, root)):
        for name, module in component.named_modules():
            found[f"{root}.{name}"] = (id(module), type(module), sorted(vars(module)))
            found[f"{root}.{name}.processor"] = id(getattr(module, "processor", None))
        for name, tensor in component.state_dict(keep_vars=True).items():
            found[f"{root}.{name} tensor"] = id(tensor)
    return found
