"""What ``fit`` and ``eval`` are both asked, and what they both say of scores with holes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import say

if TYPE_CHECKING:
    from catimage_accel.routing import Embedder, Ratings


class Features(StrEnum):
    """What a k-NN router compares prompts by."""

    NGRAMS = "ngrams"
    TEXT_ENCODER = "text-encoder"


FeaturesOption = Annotated[
    Features,
    typer.Option(help="Compare prompts by n-grams and counts, or by the catalog's text encoder."),
]
Neighbours = Annotated[int | None, typer.Option("--k", min=1, help="Neighbours; chosen by cross-validation if absent.")]
Shrinkage = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of the mean in each prediction; chosen likewise if absent.")
]


def embedder_for(loaded: Catalog | None, features: Features) -> Embedder:
    """The embedder of these features; ValueError for a text encoder without a catalog."""
    from catimage_accel.routing import CountFeatures, JointEmbedder, NGramEmbedder, TextEncoderEmbedder

    if features is Features.NGRAMS:
        return JointEmbedder(NGramEmbedder(), CountFeatures())
    if loaded is None:
        raise ValueError("features is 'text-encoder', but a table has none; accepted with --table: ngrams")
    return TextEncoderEmbedder(loaded.resolve_model(loaded.candidates[0].model))


def say_missing(ratings: Ratings, source: object, use: str) -> None:
    """One line if ``ratings`` has holes, else nothing; ``use`` says what is done with the prompts that have them."""
    if ratings.missing:
        partial = len(ratings) - len(ratings.complete_rows)
        holes = f"{partial} of {len(ratings)} prompts lack {ratings.missing} of {ratings.scores.size} scores"
        say(f"{source}: {holes}; {use}")
