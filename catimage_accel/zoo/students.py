"""Packs SnapFusion's students into the built-in catalog: a second model folder, and candidates that use it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from catimage_accel.candidate import Candidate
from catimage_accel.catalog import Catalog
from catimage_accel.engines.loading import model_class, read_config
from catimage_accel.storage import write_atomic
from catimage_accel.training.record import RECORD_FILE

FOLDER = "students"
SHARED = ("tokenizer", "text_encoder", "scheduler")
GUIDANCE_SCALE = 4.0


@dataclass(frozen=True)
class Student:
    """A candidate, and the run whose UNet it draws with, as subfolder ``unet`` of the students' folder."""

    candidate: str
    run: str
    unet: str
    steps: int


STUDENTS = (Student("student-ddim-8", "student-8", "unet", 8), Student("student-wide-ddim-8", "wide-8", "unet_wide", 8))
DECODER_RUN = "decoder"
OTHER_RUNS = ("teacher-v", "teacher-16", "efficient", "efficient-v")


def pack_students(catalog: Catalog, work: Path) -> Catalog:
    """Write ``catalog``'s ``students`` folder from the runs in ``work``, add its candidates, return the new catalog.

    The folder is a StableDiffusionPipeline with the catalog's text encoder, the efficient UNet and the pruned decoder.
    Scores and the router of candidates that are there stay; run `catimage profile` and `router fit` for the new ones.
    Raises FileNotFoundError naming the run that is not finished.
    """
    for run, part in [*((student.run, "unet") for student in STUDENTS), (DECODER_RUN, "vae")]:
        if not (work / run / part / "config.json").is_file():
            raise FileNotFoundError(f"{work / run / part} is missing; make it with `catimage distill`, recipe {run}")
    model, out = catalog.folder / "model", catalog.folder / FOLDER
    shutil.rmtree(out, ignore_errors=True)
    for part in SHARED:
        shutil.copytree(model / part, out / part)
    for student in STUDENTS:
        shutil.copytree(work / student.run / "unet", out / student.unet)
    shutil.copytree(work / DECODER_RUN / "vae", out / "vae")
    _write_json(out / "model_index.json", _index(out, read_config(model / "model_index.json")))
    runs = json.loads((catalog.folder / "training.json").read_text())
    for run in (*OTHER_RUNS, *(student.run for student in STUDENTS), DECODER_RUN):
        runs[run] = json.loads((work / run / RECORD_FILE).read_text())
    _write_json(catalog.folder / "training.json", runs)
    kept = tuple(one for one in catalog.candidates if one.model != FOLDER)
    new = tuple(
        Candidate(student.candidate, FOLDER, student.steps, "ddim", GUIDANCE_SCALE, student.unet)
        for student in STUDENTS
    )  # fmt: skip
    return replace(catalog, candidates=kept + new).save(catalog.folder)


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def _index(out: Path, index: dict[str, object]) -> dict[str, object]:
    """The pipeline's index, naming the modules of this package that have its UNet and VAE."""
    changed = {}
    for part in ("unet", "vae"):
        kind = model_class(out, part)
        library = kind.__module__ if kind.__module__.startswith("catimage_accel.") else "diffusers"
        changed[part] = [library, kind.__name__]
    return index | changed
