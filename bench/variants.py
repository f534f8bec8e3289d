"""The ways to run a pipeline's models that the end-to-end benchmarks compare, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from interleaved import Times
from torch import Tensor, nn

from catimage_accel.accelerate import accelerate

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Variant:
    """One of them."""

    channels_last: bool = False
    accelerated: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        if not (self.accelerated or self.compiled):
            parts = ["eager"]
        else:
            parts = ["accelerate()"] * self.accelerated + ["compile"] * self.compiled
        return " + ".join(parts) + (", channels_last" if self.channels_last else "")

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and latents."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


EAGER = Variant()
COMPILED = Variant(channels_last=True, compiled=True)
VARIANTS = (
    EAGER,
    Variant(channels_last=True),
    COMPILED,
    Variant(accelerated=True),
    Variant(channels_last=True, accelerated=True),
    Variant(channels_last=True, accelerated=True, compiled=True),
)
BASELINES = (EAGER.name, COMPILED.name)


def ratios(times: Mapping[str, Times], name: str) -> dict[str, float]:
    """How many times as fast as the baselines that ran a variant is."""
    return {_ratio(other): times[name].times_as_fast_as(times[other]) for other in BASELINES if other in times}


def is_compiled(name: str) -> bool:
    """Of a variant, or of another that is named like them."""
    return "compile" in name


def outcome(
    name: str, times: Mapping[str, Times], results: Mapping[str, Tensor], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """A variant's times, its ratios, and how far its result, if there is one, is from the eager one's; or why none."""
    if name not in times:
        return {"not_run": not_run[name]}
    found = times[name].figures() | ratios(times, name)
    if EAGER.name in results:
        exact = results[EAGER.name]
        found["difference"] = float((results[name] - exact).abs().max() / exact.std())
    return found


def ratio_cells(row: dict[str, Any]) -> list[str]:
    """Of the table: empty where a baseline did not run."""
    found = (row.get(_ratio(other)) for other in BASELINES)
    return ["" if ratio is None else f"{ratio:.3f}" for ratio in found]


def _ratio(baseline: str) -> str:
    return f"times as fast as {baseline}"


class Weights:
    """A pipeline's models in both layouts, each held once however many variants there are."""

    def __init__(self, **models: nn.Module) -> None:
        self._models = {torch.contiguous_format: models}

    def pipeline(self, variant: Variant, *, mode: str) -> SimpleNamespace:
        """Something with the models as attributes, ready to be called; ``mode`` is ``torch.compile``'s."""
        layout = variant.memory_format
        if layout not in self._models:
            first = self._models[torch.contiguous_format]
            self._models[layout] = {
                name: copy.deepcopy(model).to(memory_format=layout) for name, model in first.items()
            }
        pipe = SimpleNamespace(**{name: _with_same_weights(model) for name, model in self._models[layout].items()})
        if variant.accelerated:
            accelerate(pipe)
        if variant.compiled:
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True, dynamic=False)
            if hasattr(pipe, "vae"):
                pipe.vae.decoder = torch.compile(pipe.vae.decoder, mode=mode, fullgraph=True, dynamic=False)
        return pipe


def _with_same_weights(model: Model) -> Model:
    """New modules over the parameters of ``model``."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
