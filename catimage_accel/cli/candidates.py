"""``catimage candidates``: what a catalog holds."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from catimage_accel.candidate import OWN_VAE, Candidate
from catimage_accel.catalog import BUILT_IN, QUALITY_FILE, Catalog
from catimage_accel.cli.console import results
from catimage_accel.costs import Milliseconds, fastest


def list_candidates(
    catalog: Annotated[str, typer.Option(help="A catalog: a folder, a hub id, or the built-in name.")] = BUILT_IN,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a candidate instead.")] = False,
) -> None:
    """List a catalog's candidates, dearest first, with their measured costs and qualities."""
    loaded = Catalog.load(catalog)
    qualities: dict[str, float] = {}
    if (loaded.folder / QUALITY_FILE).is_file() and loaded.flops:
        scores = loaded.quality_table()
        qualities = dict(zip(scores.candidates, scores.mean_scores.tolist(), strict=True))
    rows: list[dict[str, Any]] = [
        {
            "name": candidate.name, "model": candidate.model, "unet": candidate.unet, "vae": candidate.vae,
            "steps": candidate.steps, "sampler": candidate.sampler, "guidance_scale": candidate.guidance_scale,
            "guidance_rescale": candidate.guidance_rescale, "engine": candidate.engine,
            "precision": candidate.precision, "options": dict(candidate.options),
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

    table = Table(title=f"catalog {loaded.name}: {loaded.metric}, mean over its profiled prompts")
    numbers = ("steps", "guidance", "GFLOP", loaded.metric)
    parts = ("unet", *(["vae"] if any(row["vae"] != OWN_VAE for row in rows) else []))
    for heading in ("candidate", *parts, "precision", "sampler", "options", *numbers):
        side: Literal["left", "right"] = "right" if heading in numbers else "left"
        table.add_column(heading, justify=side, no_wrap=heading == "candidate", overflow="fold")
    devices = list(dict.fromkeys(device for row in rows for device in row["milliseconds"]))
    sizes = {
        device: sorted({int(size) for row in rows for size in row["milliseconds"].get(device, {})})
        for device in devices
    }  # fmt: skip
    for device in devices:
        table.add_column(f"{device}: ms a picture\nat batch {' / '.join(map(str, sizes[device]))}", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], *(row[part] for part in parts), row["precision"], row["sampler"],
            " ".join(f"{key}={value}" for key, value in row["options"].items()),
            str(row["steps"]), _guidance(row["guidance_scale"], row["guidance_rescale"]),
            "-" if row["gflop"] is None else f"{row['gflop']:.3g}",
            "-" if row["quality"] is None else f"{row['quality']:.4f}",
            *(_times(row["milliseconds"].get(device, {}), sizes[device]) for device in devices),
        )  # fmt: skip
    results().print(table)


def _guidance(scale: float, rescale: float) -> str:
    return f"{scale:g}, rescaled {rescale:g}" if rescale else f"{scale:g}"


def _times(times: dict[str, dict[str, Any]], sizes: list[int]) -> str:
    engines = "/".join(dict.fromkeys(one["engine"] for one in times.values()))
    values = (f"{times[str(size)]['milliseconds']:.0f}" if str(size) in times else "-" for size in sizes)
    return f"{' / '.join(values)}  {engines}"


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
