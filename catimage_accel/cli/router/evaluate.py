"""``catimage router eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import progress_bar, say
from catimage_accel.cli.files import check_output
from catimage_accel.cli.router.options import (
    Features,
    FeaturesOption,
    Neighbours,
    Reader,
    Shrinkage,
    embedders_for,
    say_missing,
)
from catimage_accel.cli.router.report import print_evaluations
from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    from catimage_accel.routing import Evaluation, Ratings

ORACLE = "oracle"
DEFAULT_READERS = (Reader.KERNEL, Reader.KNN)  # the Transformer takes long to train, once a fold
STANDARD_OUTPUT = Path("-")
COLUMNS = "columns prompt_id, prompt, candidate, score, cost, and kind if there are kinds"


def evaluate_routers(
    catalog: Annotated[Path | None, typer.Argument(metavar="CATALOG", help="A profiled catalog's folder.")] = None,
    table: Annotated[Path | None, typer.Option(help=f"A CSV file instead: {COLUMNS}.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Learn from this CSV file's prompts, and judge on all of --table's.")
    ] = None,
    router: Annotated[
        list[Reader] | None, typer.Option(help="Judge this one; again for more. The kernel and k-NN if absent.")
    ] = None,
    features: FeaturesOption = Features.AUTO,
    k: Neighbours = None,
    shrinkage: Shrinkage = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that the prompts are split into, each held out once.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of folds and bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 1000,
    plot: Annotated[Path | None, typer.Option(help="Draw the deferral curves: .png, .svg or .pdf.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here; - prints them instead of the table.")
    ] = None,
) -> None:
    """Judge routers by their deferral curves on held-out prompts, with 95% bootstrap intervals.

    Prompts that lack a candidate are learnt from, never judged. Prompts in both --train and --table are judged, never
    learnt from. Where the two differ in costs, --table's count.
    """
    if (catalog is None) == (table is None):
        raise ValueError(f"CATALOG is {catalog} and --table {table}; accepted: one of the two")
    if train is not None and table is None:
        raise ValueError(f"--train is {train}, but there is no --table; accepted: --train with --table")
    _check_outputs(plot, json_file)
    loaded = None if catalog is None else Catalog.load(catalog, verify=False)
    embedder, tokens = embedders_for(loaded, features)

    from catimage_accel.routing import BASELINES, RememberingEmbedder, contenders, evaluate, judge, read_csv

    judged = loaded.ratings() if loaded is not None else read_csv(table)  # type: ignore[arg-type]
    learnt = "not judged, but learnt from" if train is None else "not judged"
    say_missing(judged, loaded.folder if loaded else table, learnt)
    complete = judged.complete()
    training = judged if train is None else _training(train, judged)
    readers = list(dict.fromkeys(router or DEFAULT_READERS))
    factories = contenders(RememberingEmbedder(embedder), tokens, k, shrinkage, readers)
    found: dict[str, Evaluation] = {}
    with progress_bar() as progress:
        bar = progress.add_task("judging", total=len(factories) + 1)
        for name, factory in factories.items():
            test = None if train is None else judged
            found[name] = evaluate(factory, training, folds=folds, test=test, seed=seed, resamples=resamples)
            progress.advance(bar)
        kinds = None if judged.kinds is None else [judged.kinds[row] for row in judged.complete_rows]
        left_out = len(judged) - len(complete)
        found[ORACLE] = judge(complete.scores, complete, kinds=kinds, left_out=left_out, seed=seed, resamples=resamples)
        progress.advance(bar)
    if plot:
        from catimage_accel.routing import plot_curves

        shown = {name: each for name, each in found.items() if name not in (*BASELINES, ORACLE)}
        unit, quality = (loaded.cost_unit, loaded.metric) if loaded else ("", "score")
        plot_curves(shown, plot, cost_unit=unit, quality=quality)
        say(f"curves drawn in {plot}")
    text = json.dumps({name: json.loads(each.to_json()) for name, each in found.items()}, indent=1)
    if json_file == STANDARD_OUTPUT:
        print(text)
        return
    if json_file is not None:
        write_atomic(json_file, (text + "\n").encode())
        say(f"figures written to {json_file}")
    print_evaluations({name: each for name, each in found.items() if name != ORACLE}, found[ORACLE])


def _training(path: Path, judged: Ratings) -> Ratings:
    from catimage_accel.routing import read_csv, training_for

    training = read_csv(path)
    say_missing(training, path, "filled in from their other scores")
    left, dropped = training_for(training, judged)
    if dropped:
        say(f"{path}: {dropped} of {len(training)} prompts also stand in --table; judged on, not learnt from")
    if left.costs.tolist() != judged.costs.tolist():
        say(f"{path}: costs differ from those of --table, which count")
    return left


def _check_outputs(plot: Path | None, json_file: Path | None) -> None:
    """Known before the work what would fail after it."""
    from catimage_accel.routing.plots import FORMATS

    if plot is not None and plot.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot is {str(plot)!r}; accepted: a file that ends in {', '.join(FORMATS)}")
    for name, path in (("--plot", plot), ("--json", json_file)):
        if path is not None and path != STANDARD_OUTPUT:
            check_output(name, path)
