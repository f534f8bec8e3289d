"""The routers that are judged side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from catimage_accel.routing.embedders import Embedder, NGramEmbedder, with_counts
from catimage_accel.routing.kernel import KernelRouter
from catimage_accel.routing.knn import KNNRouter
from catimage_accel.routing.minilm import MiniLMEmbedder, minilm_installed
from catimage_accel.routing.routers import ConstantRouter, RandomMixRouter, Router
from catimage_accel.routing.tokens import TokenEmbedder
from catimage_accel.routing.transformer import TransformerRouter

READERS = ("kernel", "k-NN", "transformer")  # of prompts
BASELINES = ("constant", "random mix")


def contenders(
    embedder: Embedder | None = None,
    tokens: TokenEmbedder | None = None,
    k: int | None = None,
    shrinkage: float | None = None,
    readers: Sequence[str] = READERS,
) -> dict[str, Callable[[], Router]]:
    """Name -> a maker of an unfitted router: those of ``readers`` that are named, then the ``BASELINES``.

    ``embedder`` is that of the kernel and the k-NN router (by default ``default_embedder()``), ``tokens`` that of the
    Transformer, ``k`` and ``shrinkage`` are those of ``KNNRouter``, "auto" where ``None``.
    """
    embedder = embedder or default_embedder()
    makers: dict[str, Callable[[], Router]] = {
        "kernel": lambda: KernelRouter(embedder),
        "k-NN": lambda: KNNRouter(embedder, "auto" if k is None else k, "auto" if shrinkage is None else shrinkage),
        "transformer": lambda: TransformerRouter(tokens),
    }
    return {name: makers[name] for name in readers} | {"constant": ConstantRouter, "random mix": RandomMixRouter}


def default_embedder() -> Embedder:
    """MiniLM where its package is installed, else n-grams; and counts and wording beside them."""
    return with_counts(MiniLMEmbedder() if minilm_installed() else NGramEmbedder())


def default_tokens() -> TokenEmbedder:
    """MiniLM's where its package is installed, else hashed words."""
    return MiniLMEmbedder() if minilm_installed() else NGramEmbedder(256)
