"""``catimage gate``: may a candidate in low precision ship?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from catimage_accel.candidate import QUANTIZED_PRECISIONS
from catimage_accel.catalog import Catalog
from catimage_accel.cli.console import loading, progress_bar, results, say
from catimage_accel.cli.files import read_prompts
from catimage_accel.storage import CHECKSUMS_FILE


def gate(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A catalog's folder.")],
    prompts: Annotated[Path | None, typer.Option(help="A text file; the profiled prompts if absent.")] = None,
    number: Annotated[int, typer.Option(min=1, help="So many of the prompts, the first.")] = 500,
    candidate: Annotated[list[str] | None, typer.Option(help="Which; all in low precision if absent.")] = None,
    max_change: Annotated[float, typer.Option(min=0, help="CLIPScore that may be lost, as a share.")] = 0.01,
    max_distance: Annotated[float, typer.Option(min=0, help="1 - cosine of the judge's embeddings, mean.")] = 0.05,
    max_batch: Annotated[int, typer.Option(min=1, help="Images in flight.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a candidate instead.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")] = None,
) -> None:
    """Compare each candidate in low precision with its twin in full precision, and write gate.json.

    Both draw the same prompts with the same seeds. Exit code 1 if one loses more CLIPScore, or lies further from its
    twin, than is allowed.
    """
    loaded = Catalog.load(catalog, verify=False)
    chosen = [loaded.candidate(name) for name in candidate or ()]
    chosen = chosen or [one for one in loaded.candidates if one.precision in QUANTIZED_PRECISIONS]
    if not chosen:
        raise ValueError(f"{catalog} has no candidate in {' or '.join(QUANTIZED_PRECISIONS)}; make one with `catimage "
                         f"quantize {catalog} --candidate NAME`")  # fmt: skip
    texts, problems = (list(loaded.ratings().prompts), []) if prompts is None else read_prompts(prompts)
    for problem in problems:
        say(problem)
    texts = list(dict.fromkeys(texts))[:number]
    with loading(f"catalog {loaded.name}"):
        from catimage_accel.arguments import find_device
        from catimage_accel.profiling import catalog_executor
        from catimage_accel.quality import CLIPScore
        from catimage_accel.quality_gate import gate as compare
        from catimage_accel.quality_gate import twin_of, write_gate

        found = find_device(device)
        executor = catalog_executor(loaded, found, max_batch=max_batch)
        pairs = [(one, twin_of(one, loaded.candidates, found)) for one in chosen]
        for one, twin in pairs:
            executor.check(one)
            executor.check(twin)
        judge = CLIPScore(loaded.judge_folder, device=found)
    gated = []
    with progress_bar() as progress:
        bar = progress.add_task("drawing", total=len(pairs) * (2 * len(texts) + max(1, len(texts) // 5)))
        for one, twin in pairs:
            gated.append(
                compare(
                    one, twin, executor, judge, texts, max_change=max_change, max_distance=max_distance,
                    advance=lambda count: progress.advance(bar, count),
                )
            )  # fmt: skip
            write_gate(loaded.folder, gated)
    if (loaded.folder / CHECKSUMS_FILE).exists():
        loaded.write_checksums()
    if as_json:
        for each in gated:
            print(json.dumps({**each.model_dump(), "passed": each.passed}))
    else:
        from rich.table import Table

        allowed = f"{max_change:.1%} of the CLIPScore and a distance of {max_distance:g}"
        table = Table(title=f"{len(texts)} prompts; allowed: {allowed}")
        for heading in ("candidate", "twin", "CLIPScore", "twin's", "change", "distance", "of other seeds", ""):
            table.add_column(heading, justify="left" if heading in ("candidate", "twin", "") else "right")
        for each in gated:
            table.add_row(
                each.candidate, each.twin, f"{each.clip_score:.4f}", f"{each.twin_clip_score:.4f}",
                f"{each.change:+.2%} [{each.change_low:+.2%}, {each.change_high:+.2%}]", f"{each.distance:.4f}",
                f"{each.seed_distance:.4f}", "passed" if each.passed else "failed",
            )  # fmt: skip
        results().print(table)
    raise typer.Exit(0 if all(each.passed for each in gated) else 1)
