"""``catimage bench``: measurements of the kernels on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from catimage_accel.cli.console import progress_bar, results, say
from catimage_accel.storage import write_atomic

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")


@app.callback()
def bench() -> None:
    """Measure the kernels on this machine."""


@app.command()
def tune(
    op: Annotated[list[str] | None, typer.Option(help="An op to tune; all of them if absent.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the configs; where the kernels look if absent.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Find the fastest launch configs of the kernels on a CUDA device and keep them for every later run."""
    import torch

    from catimage_accel.kernels import tuning

    found = torch.device(device)
    if found.type != "cuda" or not torch.cuda.is_available():
        there = "there is no CUDA device" if found.type == "cuda" else f"device is {device!r}"
        raise ValueError(f"{there}; bench tune accepts a CUDA device")
    from catimage_accel.kernels.tuning.tune import TUNED_OPS, tune

    unknown = sorted({*(op or ())} - {*TUNED_OPS})
    if unknown:
        raise ValueError(f"op is {unknown[0]!r}; accepted: {', '.join(TUNED_OPS)}")
    folder = out or tuning.FOLDER
    for name in op or TUNED_OPS:
        path = folder / f"{name}.{tuning.device_slug(found)}.json"
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        with progress_bar() as progress:
            bar = progress.add_task(f"tuning {name}", total=None)
            for tuned in tune(name, found):
                entries = tuning.with_entry(entries, tuned.entry)
                progress.advance(bar)
                for workload, ms in tuned.ms.items():
                    results().print(
                        f"{name} {workload}: {ms['tuned']:.4f} ms, {ms['default'] / ms['tuned']:.2f}x the default",
                        highlight=False,
                    )
                write_atomic(path, (json.dumps(entries, indent=1) + "\n").encode())
        say(f"{len(entries)} configs in {path}")
    tuning.forget()
