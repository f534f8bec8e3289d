"""Students are packed beside the teacher: their weights, their records, their candidates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from catimage_accel import Catalog
from catimage_accel.zoo.students import CANDIDATES, PARTS, RUNS, pack_students


@pytest.fixture
def catalog(tiny_catalog: Path, tmp_path: Path) -> Catalog:
    shutil.copytree(tiny_catalog, tmp_path / "catalog")
    (tmp_path / "catalog" / "training.json").write_text('{"teacher": {"seconds": 1}}')
    return Catalog.load(tmp_path / "catalog", verify=False)


@pytest.fixture
def work(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """The runs, all of them finished with the tiny pipeline's own parts."""
    for run in RUNS:
        (tmp_path / "work" / run).mkdir(parents=True)
        (tmp_path / "work" / run / "run.json").write_text(json.dumps({"seconds": len(run)}))
    for part in PARTS:
        shutil.copytree(tiny_sd_folder / part.partition("/")[2], tmp_path / "work" / part)
    return tmp_path / "work"


def test_weights_records_and_candidates_are_there_afterwards(catalog: Catalog, work: Path) -> None:
    pack_students(catalog, work)
    packed = Catalog.load(catalog.folder, verify=False)
    before = len(catalog.candidates)
    assert [one.name for one in packed.candidates][:before] == [one.name for one in catalog.candidates]
    assert packed.candidates[before:] == CANDIDATES
    for one in CANDIDATES:
        for part in (one.unet, one.vae):
            assert (packed.folder / "model" / part / "diffusion_pytorch_model.safetensors").is_file()
    records = json.loads((packed.folder / "training.json").read_text())
    assert set(records) == {"teacher", *RUNS}
    assert pack_students(packed, work).candidates == packed.candidates  # once more changes nothing


def test_one_run_made_anew_replaces_its_own_part_alone(catalog: Catalog, work: Path) -> None:
    pack_students(catalog, work)
    packed = Catalog.load(catalog.folder, verify=False)
    for run in RUNS[:-1]:
        shutil.rmtree(work / run)
    config = work / RUNS[-1] / "unet" / "config.json"
    unet = packed.folder / "model" / PARTS[f"{RUNS[-1]}/unet"] / "config.json"
    said = json.loads(config.read_text()) | {"sample_size": 24}
    config.write_text(json.dumps(said))
    (work / RUNS[-1] / "run.json").write_text('{"seconds": 1000}')
    pack_students(packed, work)
    assert json.loads(unet.read_text()) == said
    records = json.loads((packed.folder / "training.json").read_text())
    assert {run: records[run]["seconds"] for run in RUNS} == {run: len(run) for run in RUNS[:-1]} | {RUNS[-1]: 1000}


@pytest.mark.parametrize("missing", ["teacher-v/run.json", "decoder/vae/config.json"])
def test_a_run_that_is_not_finished_is_named_before_anything_is_written(
    catalog: Catalog, work: Path, missing: str
) -> None:
    (work / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing; finish that run"):
        pack_students(catalog, work)
    assert not (catalog.folder / "model" / CANDIDATES[0].unet).exists()
