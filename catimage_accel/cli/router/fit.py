"""``catimage router fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import progress_bar, say
from catimage_accel.cli.router.options import (
    Features,
    FeaturesOption,
    Neighbours,
    Reader,
    Shrinkage,
    embedders_for,
    say_missing,
)
from catimage_accel.storage import CHECKSUMS_FILE


def fit(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A profiled catalog's folder.")],
    router: Annotated[Reader, typer.Option(help="What to fit.")] = Reader.KERNEL,
    features: FeaturesOption = Features.AUTO,
    k: Neighbours = None,
    shrinkage: Shrinkage = None,
) -> None:
    """Fit a router on CATALOG's quality.parquet and save it as CATALOG/router."""
    from catimage_accel.routing import contenders

    loaded = Catalog.load(catalog, verify=False)
    ratings = loaded.ratings()
    say_missing(ratings, loaded.folder, "filled in from their other scores")
    unfitted = contenders(*embedders_for(loaded, features), k, shrinkage, readers=[router])[router]()
    with progress_bar() as progress:
        bar = progress.add_task(f"fitting on {len(ratings)} prompts", total=1)
        unfitted.fit(ratings.imputed()).save(loaded.folder / "router")
        progress.advance(bar)
    if (loaded.folder / CHECKSUMS_FILE).exists():
        loaded.write_checksums()
    say(f"{router} router for {len(ratings.candidates)} candidates saved in {loaded.folder / 'router'}")
