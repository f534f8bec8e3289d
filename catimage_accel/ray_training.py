"""Training runs side by side with Ray, a task for each recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Train", "train_on_ray"]

Train = Callable[[Path, Path, torch.device, int | None], Path]
"""Runs a recipe in a work folder on a device, for so many steps or the recipe's own; returns where the result is."""


def train_on_ray(
    train: Train, recipes: Sequence[Path], work: Path, steps: int | None, threads: int
) -> Iterator[Path]:  # fmt: skip
    """Results, as they come, within a connection to Ray; recipes and ``work`` must be there under the same path.

    Each task has a GPU where the cluster has any, else ``threads`` processors (0: one). A task whose worker dies goes
    on from its last checkpoint, up to three times. If a recipe fails the others are finished, then its error is raised.
    """
    import ray

    gpus = bool(ray.cluster_resources().get("GPU"))
    remote: Any = ray.remote(_trained)
    options = remote.options(num_gpus=1 if gpus else 0, num_cpus=1 if gpus else max(1, threads), max_retries=3)
    running = [options.remote(train, path, work, "cuda" if gpus else "cpu", steps, threads) for path in recipes]
    failed: Exception | None = None
    try:
        while running:
            [done], running = ray.wait(running)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                failed = failed or (error.cause if isinstance(error.cause, Exception) else error)
    finally:
        for task in running:
            ray.cancel(task)
    if failed is not None:
        raise failed


def _trained(train: Train, recipe: Path, work: Path, device: str, steps: int | None, threads: int) -> Path:
    from catimage_accel.training.process import prepare_process

    prepare_process(threads or 1)
    return train(recipe, work, torch.device(device), steps)
