"""``catimage router``: fit a catalog's router, and judge routers on prompts that they have not seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import progress_bar, results, say
from catimage_accel.storage import CHECKSUMS_FILE

if TYPE_CHECKING:
    from catimage_accel.routing import Embedder, Estimate, Evaluation, Router, ScoreTable

app = typer.Typer(help="Fit and judge routers.", no_args_is_help=True)


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


@app.command()
def fit(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A profiled catalog's folder.")],
    features: FeaturesOption = Features.NGRAMS,
    k: Neighbours = None,
    shrinkage: Shrinkage = None,
) -> None:
    """Fit a k-NN router on CATALOG's quality.parquet and save it as CATALOG/router."""
    loaded = Catalog.load(catalog, verify=False)
    table = loaded.quality_table()
    router = _knn(loaded, features, k, shrinkage)()
    with progress_bar() as progress:
        bar = progress.add_task(f"fitting on {len(table)} prompts", total=1)
        router.fit(table).save(loaded.folder / "router")
        progress.advance(bar)
    if (loaded.folder / CHECKSUMS_FILE).exists():
        loaded.write_checksums()
    say(f"router for {len(table.candidates)} candidates saved in {loaded.folder / 'router'}")


@app.command("eval")
def evaluate_routers(
    catalog: Annotated[Path | None, typer.Argument(metavar="CATALOG", help="A profiled catalog's folder.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="A CSV file instead: columns prompt_id, prompt, candidate, score, cost.")
    ] = None,
    features: FeaturesOption = Features.NGRAMS,
    k: Neighbours = None,
    shrinkage: Shrinkage = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that the prompts are split into, each held out once.")] = 5,
    seed: Annotated[int, typer.Option(help="Of folds and bootstrap.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the deferral curves: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures and curves as JSON instead.")] = False,
) -> None:
    """Judge routers by their deferral curves on held-out prompts, with 95% bootstrap intervals."""
    if (catalog is None) == (table is None):
        raise ValueError(f"CATALOG is {catalog} and --table {table}; accepted: one of the two")
    loaded = None if catalog is None else Catalog.load(catalog, verify=False)
    if loaded is None and features is Features.TEXT_ENCODER:
        raise ValueError("features is 'text-encoder', but a table has none; accepted with --table: ngrams")

    from catimage_accel.routing import ConstantRouter, RandomMixRouter, ScoreTable, evaluate, plot_curves

    scores: ScoreTable = ScoreTable.from_csv(table) if loaded is None and table else loaded.quality_table()  # type: ignore[union-attr]
    factories: dict[str, Callable[[], Router]] = {
        "k-NN": _knn(loaded, features, k, shrinkage), "constant": ConstantRouter, "random mix": RandomMixRouter,
    }  # fmt: skip
    found: dict[str, Evaluation] = {}
    with progress_bar() as progress:
        bar = progress.add_task("judging", total=len(factories))
        for name, factory in factories.items():
            found[name] = evaluate(factory, scores, folds=folds, seed=seed)
            progress.advance(bar)
    if plot:
        unit = "GFLOP" if loaded else ""
        plot_curves({"k-NN": found["k-NN"]}, plot, cost_unit=unit, quality=loaded.metric if loaded else "score")
        say(f"curves drawn in {plot}")
    if as_json:
        print(json.dumps({name: json.loads(each.to_json()) for name, each in found.items()}))
        return
    _print_evaluations(found)


def _knn(loaded: Catalog | None, features: Features, k: int | None, shrinkage: float | None) -> Callable[[], Router]:
    from catimage_accel.routing import CountFeatures, JointEmbedder, KNNRouter, NGramEmbedder, TextEncoderEmbedder

    embedder: Embedder = JointEmbedder(NGramEmbedder(), CountFeatures())
    if loaded is not None and features is Features.TEXT_ENCODER:
        embedder = TextEncoderEmbedder(loaded.resolve_model(loaded.candidates[0].model))
    return lambda: KNNRouter(embedder, "auto" if k is None else k, "auto" if shrinkage is None else shrinkage)


def _print_evaluations(found: dict[str, Evaluation]) -> None:
    from rich.table import Table

    first = next(iter(found.values()))
    shown = f"{first.prompts} held-out prompts, {len(first.candidates)} candidates"
    table = Table(title=f"{shown}, gains over the best random mix, 95% intervals")
    headings = (
        "area", "gain in area", "gain at 10% of the dearest cost", "gain share", "quality-neutral cost",
        "highest quality",
    )  # fmt: skip
    for heading in ("router", *headings):
        table.add_column(heading, justify="left" if heading == "router" else "right")
    for name, each in found.items():
        gain = (each.area.value or 0) - (each.hull_area.value or 0)
        table.add_row(
            name, _interval(each.area), f"{gain:+.5f}", _interval(each.gain_at["0.10"]), _interval(each.gain_share),
            _interval(each.qnc), _interval(each.max_quality),
        )  # fmt: skip
    table.add_section()
    table.add_row("best random mix", _interval(first.hull_area), "", "", "", "", "")
    table.add_row("oracle", _interval(first.oracle_area), "", "", "", "", "")
    table.add_row(f"always {first.best_single_candidate}", "", "", "", "", "", _interval(first.best_single))
    results().print(table)


def _interval(estimate: Estimate) -> str:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"
