"""What ``fit`` and ``eval`` are both asked, and what they both say of scores with holes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import say

if TYPE_CHECKING:
    from catimage_accel.routing import Embedder, Ratings, TokenEmbedder


class Features(StrEnum):
    """What routers compare prompts by."""

    AUTO = "auto"
    MINILM = "minilm"
    NGRAMS = "ngrams"
    TEXT_ENCODER = "text-encoder"


class Reader(StrEnum):
    """Routers that read prompts."""

    KERNEL = "kernel"
    KNN = "k-NN"
    TRANSFORMER = "transformer"


FeaturesOption = Annotated[
    Features,
    typer.Option(
        help="Compare prompts by MiniLM's embedding or by n-grams (auto: MiniLM's where it is installed), with counts "
        "and wording; or by the catalog's text encoder."
    ),
]
Neighbours = Annotated[int | None, typer.Option("--k", min=1, help="Of k-NN; chosen by cross-validation if absent.")]
Shrinkage = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Of k-NN: share of the mean in each prediction; chosen likewise if absent."),
]


def embedders_for(loaded: Catalog | None, features: Features) -> tuple[Embedder, TokenEmbedder]:
    """Of prompts and of their tokens; ValueError for a text encoder without a catalog."""
    from catimage_accel.routing import (
        MiniLMEmbedder,
        NGramEmbedder,
        TextEncoderEmbedder,
        default_embedder,
        default_tokens,
        with_counts,
    )

    if features is Features.AUTO:
        return default_embedder(), default_tokens()
    if features is Features.TEXT_ENCODER:
        if loaded is None:
            raise ValueError("features is 'text-encoder', but a table has none; accepted with --table: minilm, ngrams")
        encoder = TextEncoderEmbedder(loaded.resolve_model(loaded.candidates[0].model))
        return encoder, encoder
    tokens = MiniLMEmbedder() if features is Features.MINILM else NGramEmbedder()
    return with_counts(tokens), tokens


def say_missing(ratings: Ratings, source: object, use: str) -> None:
    """One line if ``ratings`` has holes, else nothing; ``use`` says what is done with the prompts that have them."""
    if ratings.missing:
        partial = len(ratings) - len(ratings.complete_rows)
        holes = f"{partial} of {len(ratings)} prompts lack {ratings.missing} of {ratings.scores.size} scores"
        say(f"{source}: {holes}; {use}")
