"""A profile's drawing and scoring, fanned out with Ray: an actor for each executor, a chunk of prompts at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from catimage_accel.catalog import Catalog
from catimage_accel.profiling import catalog_executor
from catimage_accel.scoring import Part, Scored, ScoreParts, score_here

if TYPE_CHECKING:
    from catimage_accel.quality import Metric

__all__ = ["MakeMetrics", "score_on_ray", "workers_of"]

MakeMetrics = Callable[[Catalog, torch.device], "list[Metric]"]


def workers_of(resources: dict[str, float], workers: int | None) -> tuple[int, float, float]:
    """(actors, processors and GPUs of each) for a cluster's resources; one actor a GPU, or a machine, unless told."""
    gpus = int(resources.get("GPU", 0))
    cpus = resources.get("CPU", 1.0)
    machines = sum(name.startswith("node:") and "__internal_head__" not in name for name in resources)
    number = workers or gpus or max(1, machines)
    return number, 0.0 if gpus else max(1, int(cpus // number)), 1.0 if gpus else 0.0


def score_on_ray(
    catalog: Catalog, make_metrics: MakeMetrics, *, max_batch: int, workers: int | None = None
) -> ScoreParts:  # fmt: skip
    """For :func:`~catimage_accel.scoring.score_candidates`, within a connection to Ray.

    ``make_metrics`` is called in each actor. The catalog's folder must be there on every machine under the same path.
    An actor that dies is started again, and its chunk drawn again, once: after that its ray.exceptions.RayError is
    raised, when all other chunks are done.
    """
    import ray

    def score_parts(parts: Sequence[Part], advance: Callable[[int], None]) -> Iterator[Scored]:
        from ray.util import ActorPool

        number, cpus, gpus = workers_of(ray.cluster_resources(), workers)
        remote: Any = ray.remote(_Scorer)
        options = remote.options(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=1)
        actors = [
            options.remote(catalog.folder.absolute(), make_metrics, max_batch, int(cpus) or None)
            for _ in range(min(number, len(parts)))
        ]
        pool = ActorPool(actors)
        for part in parts:  # the pool keeps them here until an actor is free
            pool.submit(lambda actor, one: actor.score.remote(one), part)
        images = {part.number: len(part.images) for part in parts}
        failed: Exception | None = None
        try:
            while pool.has_next():
                try:
                    found: list[Scored] = pool.get_next_unordered()
                except ray.exceptions.RayError as error:
                    failed = error
                    continue
                advance(images[found[0].number])
                yield from found
        finally:
            for actor in actors:
                ray.kill(actor)
        if failed is not None:
            raise failed

    return score_parts


class _Scorer:
    """An executor and its metrics, in an actor."""

    def __init__(self, folder: Path, make_metrics: MakeMetrics, max_batch: int, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not on this machine; every machine of the cluster needs the catalog")
        catalog = Catalog.load(folder, verify=False)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        executor = catalog_executor(catalog, device, max_batch=max_batch)
        self._score_parts = score_here(executor, make_metrics(catalog, device))

    def score(self, part: Part) -> list[Scored]:
        """All that there is to tell of the part."""
        return [_sendable(scored) for scored in self._score_parts([part], lambda _: None)]


def _sendable(scored: Scored) -> Scored:
    if scored.error is None:
        return scored
    try:
        pickle.dumps(scored.error)
    except Exception:
        text = f"{type(scored.error).__name__}: {scored.error}"
        return Scored(scored.number, scored.metric, scored.scores, RuntimeError(text))
    return scored
