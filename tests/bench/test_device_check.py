"""``bench/device_check.py`` as far as it goes without a device: what it keeps, how it shares its time, its needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device_check
import measure
import pytest
import torch
from correctness import OPS
from measure import LARGE_BYTES, UNCOMPILED, Ceilings, by_goal

from catimage_accel.kernels import tuning
from catimage_accel.kernels.group_norm.workload import workloads as group_norms
from catimage_accel.kernels.tuning import timing

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")
WIDTHS = (320, 640, 1280)
CEILINGS = Ceilings(0.001, 1000.0, {"torch.float16": 100.0, "torch.bfloat16": 100.0, "torch.float32": 50.0})


@dataclass
class Found:
    op: str
    shape: dict[str, int]
    mark: int

    @property
    def entry(self) -> dict[str, Any]:
        return {"shape": self.shape, "config": {"BLOCK_ROWS": self.mark, "num_warps": 4}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where launch configs are; the device is called "a-gpu"."""
    for file in tuning.FOLDER.glob("*.default.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "device_slug", lambda device: "a-gpu")
    tuning.forget()
    yield tmp_path
    tuning.forget()


Tune = Callable[..., Iterator[Found]]


def tuner(mark: int) -> Tune:
    """Tunes layer norms of ``WIDTHS``, nothing else."""

    def tune(op: str, device: torch.device, *, until: float) -> Iterator[Found]:
        for width in WIDTHS if op == "layer_norm" else ():
            yield Found(op, {"width": width}, mark)

    return tune


@pytest.mark.filterwarnings("ignore:no launch configs")
def test_what_was_tuned_is_used_also_where_the_time_was_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catimage_accel.kernels.tuning.tune.tune", tuner(77))
    assert tuning.launch_config("layer_norm", CPU, width=320)["BLOCK_ROWS"] != 77
    report = device_check.Report(folder / "report.json", {})
    rows = report.stage("tuning", device_check.tuning(CPU, 60.0, folder / "beside"), -1.0)
    assert [row["shape"] for row in rows] == [{"width": 320}]
    assert tuning.launch_config("layer_norm", CPU, width=320)["BLOCK_ROWS"] == 77


def test_a_further_run_keeps_what_it_does_not_reach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catimage_accel.kernels.tuning.tune.tune", tuner(1))
    assert len(list(device_check.tuning(CPU, 60.0, folder / "beside"))) == 3
    monkeypatch.setattr("catimage_accel.kernels.tuning.tune.tune", tuner(2))
    next(iter(device_check.tuning(CPU, 60.0, folder / "beside")))
    for where in (folder, folder / "beside"):
        entries = json.loads((where / "layer_norm.a-gpu.json").read_text())
        marks = [(entry["shape"]["width"], entry["config"]["BLOCK_ROWS"]) for entry in entries]
        assert sorted(marks) == [(320, 2), (640, 1), (1280, 1)]


def test_each_share_is_of_what_is_left() -> None:
    left, given = 100.0, {}
    for name, share in device_check.remaining({"a": 1, "b": 2, "c": 1}):
        given[name] = left * share
        left -= given[name] + (10.0 if name == "a" else 0.0)  # a row that took longer
    assert given == pytest.approx({"a": 25.0, "b": 65.0 * 2 / 3, "c": 65.0 / 3})


def test_all_stages_end_with_the_time_that_is_counted_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, float] = {}

    def stage(name: str) -> Callable[..., Iterator[dict[str, Any]]]:
        def rows(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
            while True:
                time.sleep(0.01)
                given[name] = given.get(name, 0.0) + 1
                yield {"impl": "triton", "right": True, "tool": "memcheck", "reached": "1 of 1"}

        return rows

    monkeypatch.setattr(device_check, "SECONDS", 3.0)
    monkeypatch.setattr(device_check, "build_cuda", lambda: time.sleep(1.5))
    monkeypatch.setattr(device_check, "map_kernels", lambda: None)
    for name in ("correctness", "tuning", "sanitizing"):
        monkeypatch.setattr(device_check, name, stage(name))
    monkeypatch.setattr(device_check, "benchmarks", lambda *arguments: iter(()))
    monkeypatch.setattr(measure, "the_device", lambda: CPU)
    monkeypatch.setattr(measure, "measure_ceilings", lambda device, timer: CEILINGS)
    monkeypatch.setattr(timing, "DeviceTimer", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["device_check.py"])
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        device_check.main()
    assert ended.value.code == 0
    assert 2.7 < time.monotonic() - start < 6
    assert set(given) == {"correctness", "tuning", "sanitizing"}
    [file] = tmp_path.glob("*.json")
    stages = json.loads(file.read_text())["stages"]
    assert list(stages) == list(device_check.SHARES)
    assert sum(stage["seconds"] for stage in stages.values()) < 2.6
    assert "compute-sanitizer ['memcheck: 1 of 1'" in capsys.readouterr().out


def test_without_a_device_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_check, "build_cuda", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(sys, "argv", ["device_check.py"])
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        device_check.main()


def test_what_a_goal_is_set_for_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_goal(measure.workloads(op) for op in OPS)
    assert sorted(found, key=lambda one: one.op != "attention") == found  # the stand-ins have no large image
    batches = [group_norms(batch, torch.float16) for batch in (2, 16)]
    norms = [workload for batch in batches for workload in batch]
    large = [workload for workload in norms if workload.bytes >= 2 * LARGE_BYTES]
    assert by_goal([found, norms])[: len(large)] == large
    assert len(large) == 22


def test_torch_compile_is_not_held_against_a_call_that_it_leaves_as_it_is() -> None:
    for op in OPS:
        workload = measure.workloads(op)[0]
        names = set(measure.calls(workload, workload.arguments(CPU)))
        assert names - {*UNCOMPILED, "int_mm"} == (set() if op in measure.ONE_CALL else {"torch.compile"})


def test_too_large_a_benchmark_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(workload: Any, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr("catimage_accel.kernels.tuning.workload.Workload.arguments", no_memory)
    rows = list(device_check.benchmarks(CPU, None, CEILINGS))
    assert len(rows) == sum(len(measure.workloads(op)) for op in OPS)
    assert rows[0]["implementations"] == {"any": {"not_run": "OutOfMemoryError: tried to allocate 9 GiB"}}
    assert all(line.endswith("not run") for line in device_check.table(rows, measure.OURS)[1:])


def test_a_tool_that_does_not_run_is_not_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sanitized

    seconds: list[float] = []

    def watch(tool: str, limit: float) -> sanitized.Watched:
        seconds.append(limit)
        return sanitized.Watched({"memcheck": True, "racecheck": None, "synccheck": False}[tool], "2 of 9", "its words")

    monkeypatch.setattr(sanitized, "watch", watch)
    rows = list(device_check.sanitizing(40.0))
    assert rows == [
        {"tool": "memcheck", "reached": "2 of 9", "right": True, "said": "its words"},
        {"tool": "racecheck", "reached": "2 of 9", "not_run": "its words"},
        {"tool": "synccheck", "reached": "2 of 9", "right": False, "said": "its words"},
    ]
    assert seconds == pytest.approx([20.0, 20.0, 40.0], rel=0.01)  # what one leaves is the next one's
    assert capsys.readouterr().out == "racecheck not run: its words\nWRONG synccheck: its words\n"


PLAIN = """
import sys
sys.modules["pytest"] = None
import device_check, torch
device_check.map_kernels()
from measure import OURS, Ceilings
from catimage_accel.kernels.tuning.timing import Timing
import correctness, sanitized
class Timer:
    def time(self, call):
        return Timing(1.0, 1.0, 1.0, 7, False)
ceilings = Ceilings(0.001, 1000.0, {"torch.float32": 50.0})
rows = list(device_check.benchmarks(torch.device("cpu"), Timer(), ceilings))
print("\\n".join(device_check.table(rows, OURS)))
"""


def test_torch_and_triton_are_enough() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=BENCH, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(OPS)
    assert not [line for line in lines if "not run" in line]
