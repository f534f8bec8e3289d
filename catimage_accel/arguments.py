"""The arguments of a drawing call, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def find_device(device: str | torch.device | None) -> torch.device:
    """The torch device named, the first CUDA device (the CPU without one) for None; ValueError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; accepted: a torch device such as cpu or cuda:0") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no CUDA device; accepted here: cpu")
    return found


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_prompts(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"prompt is {prompt!r}; accepted: a string or a list of strings")
    if not prompt:
        raise ValueError("prompt is an empty list; accepted: a string or a list of at least 1 string")
    for index, text in enumerate(prompt):
        if not isinstance(text, str):
            raise ValueError(f"prompt {index} is {text!r}; accepted: a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"prompt {index} is {text!r}; accepted: text without lone surrogates") from None
    return list(prompt)


def generators_for(
    generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> Sequence[torch.Generator]:
    """One generator an image; without any, each is seeded from torch's global one, so that routes can tell the seed."""
    if generator is None:
        return [torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ()))) for _ in range(number)]
    if isinstance(generator, torch.Generator):
        return [generator] * number
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator is {generator!r}; accepted: a torch.Generator or a list with one an image")
    if len(generator) != number:
        raise ValueError(f"generator is a list of {len(generator)}; accepted: {number}, one an image")
    return list(generator)


def check_tradeoff(tradeoff: Any) -> None:
    if tradeoff is not None and not (_is_real(tradeoff) and math.isfinite(tradeoff) and tradeoff >= 0):
        raise ValueError(f"tradeoff is {tradeoff!r}; accepted: a finite number >= 0")


def check_min_quality(min_quality: Any) -> None:
    if min_quality is not None and not (_is_real(min_quality) and math.isfinite(min_quality)):
        raise ValueError(f"min_quality is {min_quality!r}; accepted: a finite number, in the catalog's metric")


def check_one_of(**given: Any) -> None:
    """ValueError naming those that are given (not None), if more than one is."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are given; accepted: one of {', '.join(given)}, or none")


def check_budget(budget: Any, costs: Mapping[str, float], unit: str = "GFLOP") -> None:
    cheapest = min(costs, key=lambda name: costs[name])
    if budget is not None and not (_is_real(budget) and math.isfinite(budget) and budget >= costs[cheapest]):
        raise ValueError(
            f"budget is {budget!r}; accepted: a finite number of at least {costs[cheapest]:.6g} {unit} an image, "
            f"the cost of the cheapest candidate, {cheapest}"
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
