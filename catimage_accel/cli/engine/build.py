"""``catimage engine build``: the engines of a catalog's candidates, before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catimage_accel.catalog import BUILT_IN, Catalog
from catimage_accel.cli.console import loading, progress_bar, results, say
from catimage_accel.cli.engine.tables import size

if TYPE_CHECKING:
    import torch

    from catimage_accel.candidate import Candidate
    from catimage_accel.engines.cache import CacheEntry, EngineCache
    from catimage_accel.engines.components import Component, ShapeProfile
    from catimage_accel.engines.runner import Runtime


@dataclass(frozen=True)
class _Job:
    engine: str
    component: Component
    profile: ShapeProfile


def build(
    catalog: Annotated[str, typer.Argument(metavar="[CATALOG]", help="A folder, a hub id or 'emoji'.")] = BUILT_IN,
    candidate: Annotated[list[str] | None, typer.Option(help="Candidates to build for; all if absent.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime, openvino, tensorrt or tensorrt-rtx; those that run here if absent."),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes; the engine's own if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON an engine instead.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")] = None,
) -> None:
    """Build the engines that a catalog's candidates need: UNet, DeepCache's parts, decoder.

    What is in the engine cache is not built again. tensorrt-rtx builds on machines without a CUDA device, for those
    that have one. Exit code 1 if an engine could not be built.
    """
    loaded = Catalog.load(catalog, verify=False)
    wanted = [loaded.candidate(name) for name in candidate or ()] or list(loaded.candidates)
    with loading(f"catalog {loaded.name}"):
        from catimage_accel.arguments import find_device
        from catimage_accel.engines.cache import EngineCache
        from catimage_accel.engines.registry import find_runtime
        from catimage_accel.engines.unavailable import EngineUnavailable

        found = find_device(device)
        runtimes = {name: find_runtime(name) for name in engine or _able(found)}
        jobs = _jobs(loaded, wanted, runtimes, sorted(set(rows or ())), found)
    cache = EngineCache()
    rows_told, failed = [], False
    with progress_bar() as progress:
        bar = progress.add_task("building", total=len(jobs))
        for done, job in enumerate(jobs):
            name = f"{job.component.name} {job.component.precision} {job.engine}"

            def told(phase: str, share: float, done: int = done, name: str = name) -> None:
                progress.update(bar, completed=done + share, description=f"{name}: {phase.lower()}")

            progress.update(bar, completed=done, description=name)
            try:
                rows_told += _build(runtimes[job.engine], job, cache, found, told)
            except EngineUnavailable as error:
                say(f"{name}: {' '.join(str(error).split())}")
                failed = True
        progress.update(bar, completed=len(jobs), description="built")
    _show(rows_told, as_json)
    if failed:
        raise typer.Exit(1)


def _able(device: torch.device) -> list[str]:
    """The engines built from graphs that run on ``device``."""
    from catimage_accel.engines.registry import ENGINES, find_runtime

    reasons: dict[str, str | None] = {}
    for name in ENGINES:
        with suppress(ValueError):  # those in PyTorch have no runtime
            reasons[name] = find_runtime(name).why_not(device)
    if all(reasons.values()):
        raise ValueError(f"no engine that is built runs on {device}: {'; '.join(map(str, reasons.values()))}")
    return [name for name, reason in reasons.items() if reason is None]


def _jobs(
    catalog: Catalog, candidates: Sequence[Candidate], runtimes: dict[str, Runtime], rows: list[int],
    device: torch.device,
) -> list[_Job]:  # fmt: skip
    """Each graph once an engine; candidates share UNets and decoders."""
    from catimage_accel.engines.planning import components_of, shape_profile, target_device

    jobs: dict[_Job, None] = {}
    for engine, runtime in runtimes.items():
        for one in candidates:
            if one.precision not in runtime.precisions:
                say(f"{engine} has no {one.precision} for {one.name}; it has {', '.join(runtime.precisions)}")
                continue
            model = catalog.resolve_model(one.model).resolve()
            quantization = None if one.quantization is None else catalog.folder / one.quantization
            unet = one.unet_part(catalog.resolve_lora)
            profile = shape_profile(model, unet, rows or runtime.rows)
            components = components_of(
                model, unet, one.precision, quantization, target_device(engine, device),
                deepcache=one.options.get("deepcache_interval", 1) > 1, vae=one.vae,
            )  # fmt: skip
            for component in components:
                jobs[_Job(engine, component, profile)] = None
    return list(jobs)


def _build(runtime: Runtime, job: _Job, cache: EngineCache, device: torch.device, told: Any) -> list[dict[str, Any]]:
    """Rows of the table, one for each entry of the cache."""
    from catimage_accel.engines.tensorrt.runner import TensorRTRunner

    start = datetime.now(UTC)
    runner = runtime.runner(job.component, job.profile, cache, device)
    entries = runner.build(progress=told) if isinstance(runner, TensorRTRunner) else runner.build()
    return [_described(job, entry, entry.created >= start) for entry in entries]


def _described(job: _Job, entry: CacheEntry, built: bool) -> dict[str, Any]:
    from catimage_accel.engines.tensorrt.layers import LayerTable

    where = str(job.component.part)
    described = {
        "engine": job.engine, "component": entry.key.component, "part": where, "precision": entry.key.precision,
        "profile": entry.key.profile, "bytes": entry.bytes, "seconds": round(entry.build_seconds, 2),
        "from": "built" if built else "cached", "digest": entry.key.digest,
    }  # fmt: skip
    if (table := LayerTable.load(entry.folder)) is not None:
        described["layers"] = len(table.multiplying())
        described["int8_layers"] = len(table.multiplying("INT8"))
        described["quantized_weights"] = len(table.quantized_weights)
    return described


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from rich.table import Table

    table = Table(
        title="INT8 layers: convolutions and matrix products of INT8 inputs and weights; weights: stored in 8 bits"
    )
    for heading in ("engine", "component", "precision", "profile"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "seconds", "from", "INT8 layers", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        layers = f"{row['int8_layers']} of {row['layers']}" if "layers" in row else "-"
        table.add_row(
            row["engine"], f"{row['component']} ({row['part']})", row["precision"], row["profile"], size(row["bytes"]),
            f"{row['seconds']:.1f}", row["from"], layers, str(row.get("quantized_weights", "-")),
        )  # fmt: skip
    results().print(table)
