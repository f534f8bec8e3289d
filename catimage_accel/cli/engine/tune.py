"""``catimage engine tune``: which engine is the fastest for each candidate on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import loading, progress_bar, results, say
from catimage_accel.costs import fastest
from catimage_accel.storage import CHECKSUMS_FILE

if TYPE_CHECKING:
    from catimage_accel.engine_tuning import Tuned


def tune(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A catalog's folder.")],
    engine: Annotated[list[str] | None, typer.Option(help="Engines to measure; all if absent.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to time; 1, 4 and 16 if absent.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each is timed so often; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a candidate instead.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")] = None,
) -> None:
    """Time every engine for every candidate and batch size, and write the times into costs.json.

    From then on candidates whose engine is "auto" run with the fastest, and routing weighs the milliseconds an image
    that it takes at the largest batch size, instead of GFLOP.
    """
    loaded = Catalog.load(catalog, verify=False)
    with loading(f"catalog {loaded.name}"):
        from catimage_accel.arguments import find_device
        from catimage_accel.engine_tuning import tune_engines, tuned_catalog
        from catimage_accel.engines import ENGINES
        from catimage_accel.profiling import BATCH_SIZES, profiled_device

        found = find_device(device)
    engines = list(dict.fromkeys(engine or ENGINES))
    for name in engines:
        if name not in ENGINES:
            raise ValueError(f"engine is {name!r}; accepted: {', '.join(ENGINES)}")
    sizes = sorted(set(batch or BATCH_SIZES))
    with progress_bar() as progress:
        bar = progress.add_task("tuning", total=len(engines) * len(loaded.candidates))
        tuned = tune_engines(
            loaded, engines, found, sizes, rounds=rounds, advance=lambda count: progress.advance(bar, count)
        )  # fmt: skip
    for name, reasons in tuned.skipped.items():
        for reason in dict.fromkeys(reasons.values()):
            those = [one for one, why in reasons.items() if why == reason]
            which = "all candidates" if len(those) == len(loaded.candidates) else ", ".join(those)
            say(f"{name} was not measured for {which}: {reason}")
    unmeasured = [
        one.name for one in loaded.candidates if not any(one.name in times for times in tuned.milliseconds.values())
    ]
    if unmeasured:
        raise ValueError(f"no engine could run {', '.join(unmeasured)}; nothing was written")
    saved = tuned_catalog(loaded, tuned, found).save(loaded.folder)
    if (saved.folder / CHECKSUMS_FILE).exists():
        saved.write_checksums()
    _show(saved, tuned, profiled_device(found), sizes, as_json)


def _show(catalog: Catalog, tuned: Tuned, device: str, sizes: list[int], as_json: bool) -> None:
    if as_json:
        for one in catalog.candidates:
            measured = {engine: found[one.name] for engine, found in tuned.milliseconds.items() if one.name in found}
            print(json.dumps({"candidate": one.name, "device": device, "milliseconds": measured}))
        return
    from rich.table import Table

    at = " / ".join(map(str, sizes))
    table = Table(title=f"{device}: milliseconds an image at batch {at}, the fastest marked *")
    table.add_column("candidate")
    for engine in tuned.milliseconds:
        table.add_column(engine, justify="right", no_wrap=True)
    for one in catalog.candidates:
        best = {batch: by for batch, (by, _) in fastest(catalog.milliseconds, device, one.name, one.engine).items()}
        cells = []
        for engine, found in tuned.milliseconds.items():
            times = found.get(one.name, {})
            cells.append(
                " / ".join(f"{times[batch]:.0f}{'*' if best.get(batch) == engine else ''}" for batch in map(str, sizes))
                if times else "-"
            )  # fmt: skip
        table.add_row(one.name, *cells)
    results().print(table)
