"""Packs what SnapFusion's recipes made into the built-in catalog: a UNet, a decoder, and candidates that use them."""

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
TRAINING_FILE = "training.json"
RUNS = ("teacher-v", "efficient", "efficient-v", "decoder")
PARTS = {"efficient-v/unet": "unet_efficient", "decoder/vae": "vae_small"}
"""What a run made -> its subfolder of the catalog's model."""
CANDIDATES = (
    Candidate("efficient-ddim-8", MODEL, 8, "ddim", 4.0, "unet_efficient", vae="vae_small"),
    Candidate("teacher-ddim-8", MODEL, 8, "ddim", 4.0, vae="vae_small"),
)


def pack_students(catalog: Catalog, work: Path) -> Catalog:
    """Copy the finished runs in ``work`` into ``catalog``'s model and add the candidates; returns the new catalog.

    Scores and router stay as they were: `catimage profile` and `router fit` make those of the new candidates.
    FileNotFoundError names a run that is not finished.
    """
    needed = [*(work / part / "config.json" for part in PARTS), *(work / run / RECORD_FILE for run in RUNS)]
    for path in needed:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; finish that run with `catimage distill`")
    for part, name in PARTS.items():
        shutil.copytree(work / part, catalog.folder / MODEL / name, dirs_exist_ok=True)
    records = read_json(catalog.folder / TRAINING_FILE)
    records |= {run: read_json(work / run / RECORD_FILE) for run in RUNS}
    write_atomic(catalog.folder / TRAINING_FILE, (json.dumps(records, indent=2) + "\n").encode())
    new = {one.name for one in CANDIDATES}
    kept = tuple(one for one in catalog.candidates if one.name not in new)
    return replace(catalog, candidates=(*kept, *CANDIDATES)).save(catalog.folder)
