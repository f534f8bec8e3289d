"""Packs what `catimage distill` made into the built-in catalog: UNets, a decoder, and candidates that use them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from catimage_accel.candidate import Candidate
from catimage_accel.catalog import Catalog
from catimage_accel.storage import read_json, write_atomic
from catimage_accel.training.record import RECORD_FILE

MODEL = "model"
CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"
RUNS = (
    "teacher-v", "efficient", "efficient-v", "decoder", "student-v", "guided-8", "guided-efficient", "guided-4",
)  # fmt: skip
PARTS = {
    "efficient-v/unet": "unet_efficient", "decoder/vae": "vae_small", "student-v/unet": "unet_student",
    "guided-8/unet": "unet_guided", "guided-efficient/unet": "unet_guided_efficient",
    "guided-4/unet": "unet_guided_4",
}  # fmt: skip
"""What a run made -> its subfolder of the catalog's model."""
CANDIDATES = (
    Candidate("efficient-ddim-8", MODEL, 8, "ddim", 4.0, "unet_efficient", vae="vae_small"),
    Candidate("teacher-ddim-8", MODEL, 8, "ddim", 4.0, vae="vae_small"),
    Candidate("student-ddim-8", MODEL, 8, "ddim", 4.5, "unet_student", guidance_rescale=0.4),
    Candidate("guided-ddim-8", MODEL, 8, "ddim", 1.0, "unet_guided"),
    Candidate("guided-ddim-4", MODEL, 4, "ddim", 1.0, "unet_guided_4"),
    Candidate("guided-efficient-ddim-8", MODEL, 8, "ddim", 1.0, "unet_guided_efficient", vae="vae_small"),
)


def pack_students(catalog: Catalog, work: Path) -> Catalog:
    """Copy the finished runs in ``work`` into ``catalog``'s model and add the candidates; returns the new catalog.

    What ``work`` lacks and the catalog has from before stays as it is. Scores and router stay as they were:
    `catimage profile` and `router fit` make those of the new candidates.
    FileNotFoundError names a run that is not finished.
    """
    model = catalog.folder / MODEL
    records = read_json(catalog.folder / TRAINING_FILE)
    parts = {part: name for part, name in PARTS.items() if (work / part).exists() or not (model / name).exists()}
    runs = [run for run in RUNS if (work / run).exists() or run not in records]
    for path in [*(work / part / CONFIG_FILE for part in parts), *(work / run / RECORD_FILE for run in runs)]:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; finish that run with `catimage distill`")
    for part, name in parts.items():
        shutil.copytree(work / part, model / name, dirs_exist_ok=True)
    records |= {run: read_json(work / run / RECORD_FILE) for run in runs}
    write_atomic(catalog.folder / TRAINING_FILE, (json.dumps(records, indent=2) + "\n").encode())
    new = {one.name for one in CANDIDATES}
    kept = tuple(one for one in catalog.candidates if one.name not in new)
    return replace(catalog, candidates=(*kept, *CANDIDATES)).save(catalog.folder)
