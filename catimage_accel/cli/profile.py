"""``catimage profile``: measure a catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.catalog import COSTS_FILE, Catalog
from catimage_accel.cli.console import loading, progress_bar, say
from catimage_accel.cli.files import read_prompts
from catimage_accel.storage import CHECKSUMS_FILE, write_atomic

if TYPE_CHECKING:
    import torch

    from catimage_accel.quality import Metric
    from catimage_accel.ray_scoring import MakeMetrics
    from catimage_accel.scoring import ScoreParts


def profile(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A catalog's folder.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line: draw and score each with every candidate.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images of every prompt by every candidate.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to time; 1, 4 and 16 if absent.")] = None,
    timing: Annotated[bool, typer.Option(help="Measure milliseconds, too.")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="clip_score (the default), sharpness, aesthetic or image_reward; repeat it for several."),
    ] = None,
    aesthetic_head: Annotated[Path | None, typer.Option(help="For aesthetic: the head, .safetensors or .pth.")] = None,
    aesthetic_clip: Annotated[str | None, typer.Option(help="For aesthetic: its CLIP, a folder or hub id.")] = None,
    image_reward: Annotated[str | None, typer.Option(help="For image_reward: the model, a folder or hub id.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompts between two writes of quality.parquet.")] = 32,
    max_batch: Annotated[int, typer.Option(min=1, help="Images in flight.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Draw and score with Ray, on this machine or the cluster it belongs to.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: executors; default: one a GPU, or a machine without.")
    ] = None,
) -> None:
    """Measure a catalog: FLOPs and milliseconds an image into costs.json, scores into quality.parquet.

    Run it again after an interruption and it goes on with the prompts that have no score yet. One drawing serves all
    metrics of a run.
    """
    loaded = Catalog.load(catalog, verify=False)
    options = {"--aesthetic-head": aesthetic_head, "--aesthetic-clip": aesthetic_clip, "--image-reward": image_reward}
    names = metric or ["clip_score"]
    texts: list[str] = []
    if metric and prompts is None:
        raise ValueError(f"metric is {', '.join(metric)}, but there is nothing to score; give --prompts")
    if prompts is not None:
        texts, problems = read_prompts(prompts)
        for problem in problems:
            say(problem)
        if not texts:
            raise ValueError(f"prompts is {str(prompts)!r}, which has no prompts; accepted: text, one prompt a line")

    with loading(f"catalog {loaded.name}"):
        from catimage_accel import profiling
        from catimage_accel.arguments import find_device

        found = find_device(device)
        executor = profiling.catalog_executor(loaded, found, max_batch=max_batch)
        for candidate in loaded.candidates:
            executor.check(candidate)
        metrics = _metrics(names, loaded, found, options=options) if texts else []
    with progress_bar() as progress:
        bar = progress.add_task("counting FLOPs", total=len(loaded.candidates))
        flops = profiling.count_flops(loaded, lambda number: progress.advance(bar, number))
        milliseconds = json.loads(json.dumps(loaded.milliseconds))
        _write_costs(loaded, flops, milliseconds)
        if timing:
            bar = progress.add_task("timing", total=len(loaded.candidates))
            timed = profiling.time_candidates(
                loaded, executor, batch or profiling.BATCH_SIZES, lambda number: progress.advance(bar, number)
            )  # fmt: skip
            for candidate in loaded.candidates:
                engines = milliseconds.setdefault(profiling.profiled_device(found), {})
                engines.setdefault(executor.prepare(candidate)[0].name, {})[candidate.name] = timed[candidate.name]
            _write_costs(loaded, flops, milliseconds)
        if texts:
            from catimage_accel.scoring import score_candidates

            def estimate(images: int, seconds: float | None) -> None:
                time = "how long is told after the first chunk" if seconds is None else f"about {_about(seconds)}"
                say(f"{images:,} images to draw, {time} on {profiling.profiled_device(found)}")

            total = len(set(texts)) * len(loaded.candidates) * seeds
            bar = progress.add_task("drawing and scoring", total=total)
            with _fanned_out(ray, loaded, partial(_metrics, names, options=options), max_batch, workers) as score_parts:
                added = score_candidates(
                    replace(loaded, flops=flops, milliseconds=milliseconds), executor, metrics, texts,
                    range(first_seed, first_seed + seeds), chunk=chunk,
                    advance=lambda number: progress.advance(bar, number), estimate=estimate, score_parts=score_parts,
                )  # fmt: skip
            say(f"{added} scores added")
    _refresh_checksums(loaded)


@contextmanager
def _fanned_out(
    ray: bool, catalog: Catalog, make_metrics: MakeMetrics, max_batch: int, workers: int | None
) -> Iterator[ScoreParts | None]:
    """Who draws and scores: Ray's actors, or None for this process."""
    if not ray:
        yield None
        return
    from catimage_accel.ray_cluster import connect
    from catimage_accel.ray_scoring import score_on_ray

    with connect():
        yield score_on_ray(catalog, make_metrics, max_batch=max_batch, workers=workers)


def _metrics(
    names: Sequence[str], catalog: Catalog, device: torch.device, *, options: Mapping[str, Path | str | None]
) -> list[Metric]:
    from catimage_accel.quality import METRICS, load_metric

    needs = {"aesthetic": ("--aesthetic-clip", "--aesthetic-head"), "image_reward": ("--image-reward",)}
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric is {name!r}; accepted: {', '.join(METRICS)}")
        for option in needs.get(name, ()):
            if options[option] is None:
                raise ValueError(f"metric is {name}, which needs {' and '.join(needs[name])}")
    clips = {"clip_score": catalog.judge_folder} if "clip_score" in names else {}
    return [
        load_metric(
            name, clip=options["--aesthetic-clip"] if name == "aesthetic" else clips.get(name),
            weights=options["--image-reward" if name == "image_reward" else "--aesthetic-head"], device=device,
        )
        for name in dict.fromkeys(names)
    ]  # fmt: skip


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _write_costs(catalog: Catalog, flops: dict[str, int], milliseconds: dict[str, dict]) -> None:
    content = json.dumps({"flops": flops, "milliseconds": milliseconds}, indent=1) + "\n"
    write_atomic(catalog.folder / COSTS_FILE, content.encode())


def _refresh_checksums(catalog: Catalog) -> None:
    if (catalog.folder / CHECKSUMS_FILE).exists():
        catalog.write_checksums()
