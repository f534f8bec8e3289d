"""Routers read back from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from catimage_accel.routing.embedders import Embedder
from catimage_accel.routing.kernel import KernelRouter
from catimage_accel.routing.knn import KNNRouter
from catimage_accel.routing.routers import ConstantRouter, OracleRouter, RandomMixRouter, Router, check_candidates
from catimage_accel.routing.storage import SavedRouter
from catimage_accel.routing.transformer import TransformerRouter


def load_router(
    folder: str | Path, embedder: Embedder | None = None, *, candidates: Sequence[str] | None = None
) -> Router:
    """Read what a router's ``save`` wrote.

    ``embedder`` replaces the one that the folder names, say to share a text encoder that is loaded already. With
    ``candidates``, a router fitted for others, or for these in another order, is a ValueError naming both.
    FileNotFoundError for a missing file; ValueError for one that was changed or cut off, and for an embedder that
    gives other vectors.
    """
    saved = SavedRouter.read(folder)
    if candidates is not None:
        check_candidates(saved.candidates, candidates)
    try:
        return _restored(saved, embedder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{saved.folder}: a {saved.kind} router's settings are missing or wrong: {error!r}") from error


def _restored(saved: SavedRouter, embedder: Embedder | None) -> Router:
    match saved.kind:
        case KNNRouter.KIND:
            return KNNRouter.restore(saved, embedder)
        case KernelRouter.KIND:
            return KernelRouter.restore(saved, embedder)
        case TransformerRouter.KIND:
            return TransformerRouter.restore(saved, embedder)
        case ConstantRouter.KIND:
            return ConstantRouter.restore(saved)
        case RandomMixRouter.KIND:
            return RandomMixRouter.restore(saved)
        case OracleRouter.KIND:
            return OracleRouter.restore(saved)
    raise ValueError(
        f"{saved.folder}: router of kind {saved.kind!r}, "
        "expected kernel, knn, transformer, constant, random_mix or oracle"
    )
