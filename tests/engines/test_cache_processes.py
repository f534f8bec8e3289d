"""The engine cache under threads and processes that share it, and that are killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cache_parts import KEY, builds, hidden, keys, never, visible

from catimage_accel.engines.cache import CacheEntry, EngineCache


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_threads_build_once(cache: EngineCache) -> None:
    log: list[bytes] = []

    def build(folder: Path) -> None:
        time.sleep(0.2)
        builds(b"engine", log)(folder)

    found: list[CacheEntry] = []
    wanted = [KEY, replace(KEY, precision="fp32")] * 4
    threads = [threading.Thread(target=lambda key=key: found.append(cache.get_or_build(key, build))) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log) == 2
    assert sorted(entry.key.precision for entry in found) == ["fp32"] * 4 + ["int8"] * 4


def test_threads_that_build_and_evict_at_once_never_see_half_an_entry(tmp_path: Path) -> None:
    caches = [EngineCache(tmp_path, max_bytes=3000) for _ in range(4)]
    problems: list[BaseException] = []

    def work(cache: EngineCache, seed: int) -> None:
        try:
            for step in range(25):
                key = keys(6)[(step * seed) % 6]
                with cache.held(key):
                    entry = cache.get_or_build(key, builds(key.profile.encode() * 10))
                    assert (entry.folder / "model.onnx").read_bytes() == key.profile.encode() * 10
        except BaseException as error:
            problems.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work, args=(cache, seed)) for seed, cache in enumerate(caches, start=1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert caches[0].verify() == []
    caches[0].prune()
    assert caches[0].disk_bytes() <= 3000
    assert hidden(caches[0]) == []


BUILDER = """
import os, sys, time
from pathlib import Path
from dataclasses import replace
from catimage_accel.engines.cache import EngineCache, EngineKey

folder, job = Path(sys.argv[1]), sys.argv[2]
key = EngineKey(*sys.argv[3:12])
cache = EngineCache(folder / "engines")

def build(into):
    (into / "model.onnx").write_bytes(b"half of it")
    (folder / f"{job}-building").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    (into / "model.onnx").write_bytes(b"all of it")

def many(into):
    for part in range(20):
        (into / f"part{part}").write_bytes(os.urandom(2000))

(folder / f"{job}-started").touch()
if job == "many":
    for rows in range(1, 100000):
        cache.get_or_build(replace(key, profile=f"rows={rows}"), many)
else:
    print((cache.get_or_build(key, build).folder / "model.onnx").read_text())
"""


def start(folder: Path, job: str) -> subprocess.Popen[str]:
    """A process that builds KEY in ``folder / "engines"``, or one key after the other; waits until it is at it."""
    arguments = [str(getattr(KEY, field.name)) for field in fields(KEY) if field.name != "options"]
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), job, *arguments], stdout=subprocess.PIPE, text=True
    )
    wait_for(folder / f"{job}-started")
    return process


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.01)


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, "one"), start(tmp_path, "two")]
    time.sleep(0.3)  # for the second to reach the lock
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["all of it\n"] * 2
    assert len(list(tmp_path.glob("*-building"))) == 1
    assert EngineCache(tmp_path / "engines").verify() == []


def test_a_killed_build_is_never_loaded_and_who_waited_builds(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    killed = start(tmp_path, "killed")
    wait_for(tmp_path / "killed-building")
    waiting = start(tmp_path, "waiting")
    assert len(hidden(cache)) == 1
    assert cache.prune(0) == []
    assert len(hidden(cache)) == 1  # a build under way is no leftover
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert cache.find(KEY) is None
    assert cache.entries() == []
    wait_for(tmp_path / "waiting-building")
    (tmp_path / "go").touch()
    assert waiting.communicate(timeout=60)[0] == "all of it\n"
    assert hidden(cache) == []
    assert (cache.get_or_build(KEY, never).folder / "model.onnx").read_text() == "all of it"


def test_what_a_killed_build_left_goes(tmp_path: Path) -> None:
    killed = start(tmp_path, "killed")
    wait_for(tmp_path / "killed-building")
    killed.kill()
    killed.communicate()
    for clean in ("same key", "other key", "prune"):
        cache = EngineCache(tmp_path / clean)
        shutil.copytree(tmp_path / "engines", cache.folder)
        assert len(hidden(cache)) == 1
        if clean == "prune":
            cache.prune()
        else:
            cache.get_or_build(KEY if clean == "same key" else replace(KEY, precision="fp32"), builds())
        assert hidden(cache) == []
        assert cache.get_or_build(KEY, builds()).bytes == 24


def test_killed_at_any_moment_every_entry_is_whole(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    process = start(tmp_path, "many")
    wait_for(cache.folder)
    time.sleep(0.15)
    process.kill()
    process.communicate()
    assert visible(cache)
    assert cache.verify() == []
    assert len(cache.entries()) == len(visible(cache))
    cache.prune(0)
    assert visible(cache) == hidden(cache) == []
