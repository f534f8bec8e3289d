"""``catimage candidates``: what a catalog holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catimage_accel.candidate import OWN_VAE, Candidate
from catimage_accel.catalog import BUILT_IN, QUALITY_FILE, Catalog
from catimage_accel.cli.console import results
from catimage_accel.costs import Milliseconds, fastest

if TYPE_CHECKING:
    from rich.table import Table


def list_candidates(
    catalog: Annotated[str, typer.Option(help="A catalog: a folder, a hub id, or the built-in name.")] = BUILT_IN,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a candidate instead.")] = False,
) -> None:
    """List a catalog's candidates, dearest first, with their measured costs and qualities."""
    loaded = Catalog.load(catalog)
    qualities = loaded.mean_scores() if (loaded.folder / QUALITY_FILE).is_file() else {}
    rows: list[dict[str, Any]] = [
        {
            "name": candidate.name, "model": candidate.model, "unet": candidate.unet, "vae": candidate.vae,
            "lora": candidate.lora, "lora_scale": candidate.lora_scale, "steps": candidate.steps,
            "sampler": candidate.sampler, "timestep_spacing": candidate.timestep_spacing,
            "guidance_scale": candidate.guidance_scale, "guidance_rescale": candidate.guidance_rescale,
            "engine": candidate.engine, "precision": candidate.precision, "options": dict(candidate.options),
            "gflop": loaded.flops[candidate.name] / 1e9 if candidate.name in loaded.flops else None,
            "quality": qualities.get(candidate.name),
            "milliseconds": _milliseconds(loaded.milliseconds, candidate),
        }
        for candidate in loaded.candidates
    ]  # fmt: skip
    try:
        costs = loaded.costs
    except ValueError:  # some are not measured yet
        costs = {}
    rows.sort(key=lambda row: -costs.get(row["name"], row["gflop"] or 0.0))
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return

    from rich.table import Table

    table = Table(title=f"catalog {loaded.name}: {loaded.metric}, mean over a candidate's profiled prompts")
    table.add_column("candidate", no_wrap=True)
    table.add_column("how it draws")
    table.add_column("GFLOP", justify="right", no_wrap=True)
    table.add_column(loaded.metric, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"], _description(row), "-" if row["gflop"] is None else f"{row['gflop']:.3g}",
            "-" if row["quality"] is None else f"{row['quality']:.4f}",
        )  # fmt: skip
    results().print(table)
    for device in dict.fromkeys(device for row in rows for device in row["milliseconds"]):
        results().print(_times(device, rows))


def _description(row: dict[str, Any]) -> str:
    guidance = f"guidance {row['guidance_scale']:g}"
    if row["guidance_rescale"]:
        guidance += f" rescaled {row['guidance_rescale']:g}"
    sampler = row["sampler"] if row["timestep_spacing"] is None else f"{row['timestep_spacing']} {row['sampler']}"
    lora = [] if row["lora"] is None else [f"LoRA {Path(row['lora']).name} x {row['lora_scale']:g}"]
    parts = [row["unet"], *lora, *([row["vae"]] if row["vae"] != OWN_VAE else []), row["precision"]]
    options = [f"{key}={value}" for key, value in row["options"].items()]
    return ", ".join([f"{row['steps']} steps of {sampler}", guidance, *parts, *options])


def _times(device: str, rows: list[dict[str, Any]]) -> Table:
    """A candidate's milliseconds a picture on a device, by batch size."""
    from rich.table import Table

    measured = {row["name"]: row["milliseconds"][device] for row in rows if device in row["milliseconds"]}
    sizes = sorted({int(size) for times in measured.values() for size in times})
    table = Table(title=f"{device}: ms a picture at batch size")
    table.add_column("candidate", no_wrap=True)
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    table.add_column("engine")
    for name, times in measured.items():
        engines = ", ".join(dict.fromkeys(one["engine"] for one in times.values()))
        cells = (f"{times[str(size)]['milliseconds']:.0f}" if str(size) in times else "-" for size in sizes)
        table.add_row(name, *cells, engines)
    return table


def _milliseconds(measured: Milliseconds, candidate: Candidate) -> dict[str, dict[str, dict[str, Any]]]:
    """Device -> batch size -> the fastest engine and its milliseconds an image, where measured."""
    found = {
        device: {
            batch: {"engine": engine, "milliseconds": value}
            for batch, (engine, value) in fastest(measured, device, candidate.name, candidate.engine).items()
        }
        for device in measured
    }  # fmt: skip
    return {device: times for device, times in found.items() if times}
