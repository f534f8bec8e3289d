"""Checkpoints of a training run: one safetensors file, replaced as a whole, that knows the run it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from catimage_accel.storage import write_tensors
from catimage_accel.training.config import MAY_CHANGE, TrainConfig

PROCESSES = "processes"


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    step: int,
    seconds: float,
    config: TrainConfig,
    recipe: Mapping[str, Any],
    processes: int = 1,
) -> None:
    """Write all of it to ``path``, or, if the process dies meanwhile, nothing."""
    metadata = {
        "step": str(step), "seconds": str(seconds), "config": json.dumps(asdict(config) | {PROCESSES: processes}),
        "recipe": json.dumps(dict(recipe), sort_keys=True),
    }  # fmt: skip
    write_tensors(path, tensors, metadata)


def read_checkpoint(
    path: Path, config: TrainConfig, recipe: Mapping[str, Any], processes: int = 1
) -> tuple[dict[str, torch.Tensor], int, float]:
    """The tensors, the step and the seconds spent; ValueError if the file is broken or belongs to another run."""
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
        tensors = load_file(path)
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        # Checkpoints of before the number of processes was kept are taken to be of one.
        was = {"config": {PROCESSES: 1} | json.loads(metadata["config"]), "recipe": json.loads(metadata["recipe"])}
    except (SafetensorError, KeyError, ValueError) as error:
        text = f"{path} is no checkpoint that can be gone on from ({error}); delete it to start anew"
        raise ValueError(text) from None
    now = {"config": asdict(config) | {PROCESSES: processes}, "recipe": json.loads(json.dumps(dict(recipe)))}
    for part, values in now.items():
        for name in sorted(values.keys() | was[part].keys()):
            before, after = was[part].get(name), values.get(name)
            if before != after and not (part == "config" and name in MAY_CHANGE):
                raise ValueError(
                    f"{path} was written with {name} = {before!r}, this run has {after!r}; "
                    "go on with the settings it was begun with, or give the run a folder of its own"
                )
    return tensors, step, seconds
