"""The routers that are judged side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from catimage_accel.routing.embedders import Embedder
from catimage_accel.routing.knn import KNNRouter
from catimage_accel.routing.routers import ConstantRouter, RandomMixRouter, Router

BASELINES = ("constant", "random mix")


def contenders(
    embedder: Embedder | None = None,
    k: int | Literal["auto"] = "auto",
    shrinkage: float | Literal["auto"] = "auto",
) -> dict[str, Callable[[], Router]]:
    """Name -> a maker of an unfitted router: first those that read prompts, last the ``BASELINES``, which don't.

    ``embedder``, ``k`` and ``shrinkage`` are those of ``KNNRouter``.
    """
    return {
        "k-NN": lambda: KNNRouter(embedder, k, shrinkage),
        "constant": ConstantRouter,
        "random mix": RandomMixRouter,
    }
