"""Profiles and training runs fanned out with Ray give what they give without."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tomli_w
from typer.testing import CliRunner

from catimage_accel.cli import app
from catimage_accel.ray_cluster import connect
from catimage_accel.ray_scoring import workers_of

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
PROMPTS = [f"{number} dogs" for number in range(8)]


def catimage(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("resources", "workers", "expected"),
    [
        ({"CPU": 8.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}, None, (1, 8, 0.0)),
        ({"CPU": 8.0, "node:10.0.0.1": 1.0, "node:10.0.0.2": 1.0}, None, (2, 4, 0.0)),
        ({"CPU": 8.0, "GPU": 4.0, "node:10.0.0.1": 1.0}, None, (4, 0.0, 1.0)),
        ({"CPU": 2.0, "node:10.0.0.1": 1.0}, 2, (2, 1, 0.0)),
    ],
    ids=["one-machine", "two-machines", "four-gpus", "as-told"],
)
def test_workers_of(resources: dict[str, float], workers: int | None, expected: tuple[int, float, float]) -> None:
    assert workers_of(resources, workers) == expected


def test_no_cluster_at_an_address_is_told() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: "), connect("127.0.0.1:1"):
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


def profiled(folder: Path, prompts: Path, *options: object) -> Any:
    return catimage(
        "profile", folder, "--prompts", prompts, "--no-timing", "--chunk", 2, "--device", "cpu",
        "--metric", "sharpness", "--metric", "clip_score", *options,
    )  # fmt: skip


def scores(folder: Path) -> list[dict[str, Any]]:
    rows = pyarrow.parquet.read_table(folder / "quality.parquet").to_pylist()
    return sorted(rows, key=lambda row: tuple(str(row[key]) for key in ("prompt", "candidate", "seed", "metric")))


@pytest.fixture
def catalogs(tiny_catalog: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two copies without scores, and a file of prompts."""
    folders = tmp_path / "here", tmp_path / "ray"
    for folder in folders:
        shutil.copytree(tiny_catalog, folder)
        (folder / "quality.parquet").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return *folders, prompts


@pytest.mark.slow
def test_a_profile_is_the_same_bit_for_bit(cluster: None, catalogs: tuple[Path, Path, Path]) -> None:
    here, fanned, prompts = catalogs
    assert profiled(here, prompts).exit_code == 0
    done = profiled(fanned, prompts, "--ray", "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "48 scores added" in done.output
    assert scores(fanned) == scores(here)
    assert "0 scores added" in profiled(fanned, prompts, "--ray").output


@pytest.mark.slow
def test_a_killed_actor_costs_no_score(cluster: None, catalogs: tuple[Path, Path, Path]) -> None:
    here, fanned, prompts = catalogs
    assert profiled(here, prompts).exit_code == 0
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for folder in Path("/proc").iterdir():
                if folder.name.isdigit() and "ray::_Scorer.score" in _title(folder):
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed.append(int(folder.name))
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    done = profiled(fanned, prompts, "--ray", "--workers", 2)
    killer.join()
    assert killed
    assert done.exit_code == 0, done.output
    assert scores(fanned) == scores(here)


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_recipes_run_side_by_side_and_give_what_they_give_alone(
    cluster: None, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\n")
    paths = []
    for name, seed in (("one", 1), ("two", 2)):
        training = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup": 1, "precision": "fp32", "seed": seed}
        values = {
            "model": str(tiny_sd_folder), "prompts": "words.txt", "number": 2, "steps": 1, "guidance_scale": 1.0,
            "training": training,
        }  # fmt: skip
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(tomli_w.dumps(values))
    done = catimage("distill", "decoder", *paths, "--work", tmp_path / "ray", "--threads", 1, "--ray")
    assert done.exit_code == 0, done.output
    assert done.output.count("written to") == 2
    here = catimage("distill", "decoder", *paths, "--work", tmp_path / "here", "--threads", 1)
    assert here.exit_code == 0, here.output
    for name in ("one", "two"):
        weights = [
            (tmp_path / where / name / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
            for where in ("ray", "here")
        ]
        assert weights[0] == weights[1]


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.toml").write_text("")
    done = catimage("distill", "decoder", tmp_path / "a" / "same.toml", tmp_path / "b" / "same.toml")
    assert done.exit_code == 2
    assert "recipes are same, same; accepted: names that differ" in done.output
