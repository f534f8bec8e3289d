"""Pictures of prompts by a candidate, kept in a folder, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.executor import Executor, Job
from catimage_accel.scoring import image_seed
from catimage_accel.storage import CHECKSUMS_FILE

CHUNK = 100


def draw(
    catalog: Catalog, executor: Executor, candidate: Candidate, prompts: list[str], seed: int, kept: Path
) -> np.ndarray:
    """uint8 (prompts, 64, 64, 3), in chunks that are kept in the folder."""
    files = json.loads((catalog.folder / CHECKSUMS_FILE).read_text())["files"]
    used_parts = (candidate.unet, candidate.vae, "text_encoder", "tokenizer", "scheduler")
    used = tuple(f"{candidate.model}/{part}/" for part in used_parts)
    models = [files[path]["sha256"] for path in sorted(files) if path.startswith(used)]
    kept.mkdir(parents=True, exist_ok=True)
    parts = []
    starts = range(0, len(prompts), CHUNK)
    for start in track(starts, f"{candidate.name}, seed {seed}"):
        chunk = prompts[start : start + CHUNK]
        path = kept / f"{candidate.name}-{seed}-{zlib.crc32(repr((models, candidate, chunk)).encode()):08x}.npy"
        if not path.exists():
            jobs = (
                Job(prompt, candidate, torch.Generator().manual_seed(image_seed(seed, prompt)), key=index)
                for index, prompt in enumerate(chunk)
            )
            images: dict[int, np.ndarray] = {}
            for finished in executor.run(jobs):
                if finished.image is None:
                    raise RuntimeError(f"{candidate.name} could not draw {finished.job.prompt!r}") from finished.error
                images[finished.key] = finished.image
            pictures = np.stack([images[index] for index in range(len(chunk))])
            partial = path.with_suffix(".partial.npy")
            np.save(partial, pictures)
            partial.replace(path)
        parts.append(np.load(path))
    return np.concatenate(parts)
