"""Recipes: NVIDIA ModelOpt's configurations, made for UNets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from catimage_accel.quantize.modelopt import load_modelopt

__all__ = ["RECIPES", "Recipe", "find_recipe", "modelopt_config"]


@dataclass(frozen=True)
class Recipe:
    """A ModelOpt configuration: ``config`` is its name there, ``format`` what it stores.

    ``percentile`` is where activations are clipped unless told otherwise: integers gain from finer steps, while the
    steps of fp8 are finer for small values as it is. ``smoothing`` is SmoothQuant's alpha, how much of the activations'
    spread moves into the weights: its authors' is 0.5 (arXiv 2211.10438), ModelOpt's own 1.
    """

    name: str
    format: str
    config: str
    percentile: float
    smoothing: float | None = None


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", "int8", "INT8_DEFAULT_CFG", 99.999),
        Recipe("int8-smoothquant", "int8", "INT8_SMOOTHQUANT_CFG", 99.999, 0.5),
        Recipe("fp8", "fp8", "FP8_DEFAULT_CFG", 100.0),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError lists those there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; accepted: {', '.join(RECIPES)}")
    return RECIPES[name]


def modelopt_config(recipe: Recipe, layers: Iterable[str], outputs: bool) -> dict[str, Any]:
    """The configuration for ``mtq.quantize`` that quantizes these layers and nothing else.

    Number formats and algorithm are the recipe's. Its patterns are not: they leave out ``*proj_out.*`` and others,
    which in language models are heads and routers but in UNets plain projections, and take in the inputs of
    LayerNorms, which no engine runs in INT8. What is left out here is decided by measurement.

    With ``outputs`` a layer's output is rounded like its input, so that engines can hand integers from layer to layer.
    """
    config = getattr(load_modelopt(), recipe.config)
    formats = {entry["quantizer_name"]: entry["cfg"] for entry in config["quant_cfg"] if entry.get("cfg")}
    weight, activation = formats["*weight_quantizer"], formats["*input_quantizer"]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in layers:
        entries.append({"quantizer_name": f"{layer}.weight_quantizer", "cfg": weight})
        entries.append({"quantizer_name": f"{layer}.input_quantizer", "cfg": activation})
        if outputs:
            entries.append({"quantizer_name": f"{layer}.output_quantizer", "cfg": activation})
    algorithm = config["algorithm"]
    if recipe.smoothing is not None:
        algorithm = {"method": "smoothquant", "alpha": recipe.smoothing}
    return {"quant_cfg": entries, "algorithm": algorithm}
