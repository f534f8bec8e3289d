"""Packs SnapFusion's students into the built-in catalog: UNets and a decoder beside the teacher's, and candidates."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from catimage_accel.candidate import Candidate
from catimage_accel.catalog import Catalog
from catimage_accel.storage import read_json, write_atomic
from catimage_accel.training.record import RECORD_FILE

MODEL = "model"
GUIDANCE_SCALE = 4.0
TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class Student:
    """A candidate, the run that made its UNet, and the UNet's and the VAE's subfolders of the catalog's model."""

    candidate: str
    run: str
    unet: str
    vae: str
    steps: int


STUDENTS = (
    Student("student-ddim-8", "student-8", "unet_student", "vae_small", 8),
    Student("wide-ddim-8", "wide-8", "unet_wide", "vae_small", 8),
)
DECODER_RUN = "decoder"
RUNS = ("teacher-v", "teacher-16", "efficient", "efficient-v", *(student.run for student in STUDENTS), DECODER_RUN)


def pack_students(catalog: Catalog, work: Path) -> Catalog:
    """Copy the finished runs in ``work`` into ``catalog``'s model and add their candidates; returns the new catalog.

    Scores and router stay as they were: `catimage profile` and `router fit` make those of the new candidates.
    FileNotFoundError names a run that is not finished.
    """
    parts = {f"{student.run}/unet": student.unet for student in STUDENTS} | {
        f"{DECODER_RUN}/vae": student.vae for student in STUDENTS
    }
    needed = [*(work / part / "config.json" for part in parts), *(work / run / RECORD_FILE for run in RUNS)]
    for path in needed:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; finish that run with `catimage distill`")
    for part, name in parts.items():
        shutil.copytree(work / part, catalog.folder / MODEL / name, dirs_exist_ok=True)
    records = read_json(catalog.folder / TRAINING_FILE)
    records |= {run: read_json(work / run / RECORD_FILE) for run in RUNS}
    write_atomic(catalog.folder / TRAINING_FILE, (json.dumps(records, indent=2) + "\n").encode())
    new = {
        student.candidate: Candidate(
            student.candidate, MODEL, student.steps, "ddim", GUIDANCE_SCALE, student.unet, vae=student.vae
        )
        for student in STUDENTS
    }
    kept = tuple(one for one in catalog.candidates if one.name not in new)
    return replace(catalog, candidates=(*kept, *new.values())).save(catalog.folder)
