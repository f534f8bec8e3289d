"""Which built engines the cache throws away, and which not."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cache_parts import KEY, builds, hidden, keys, never, visible

from catimage_accel.engines import cache as cache_module
from catimage_accel.engines.cache import CacheEntry, EngineCache


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def fill(cache: EngineCache, number: int, size: int = 1000) -> list[CacheEntry]:
    """Entries of ``size`` bytes, made or there already, last used one minute after the other."""
    start = time.time() - 3600
    entries = []
    for index, key in enumerate(keys(number)):
        entry = cache.get_or_build(key, lambda folder: (folder / "engine").write_bytes(bytes(size)) and None)
        os.utime(entry.folder / "entry.json", (0, start + 60 * index))
        entries.append(entry)
    return entries


def profiles(cache: EngineCache) -> set[str]:
    return {entry.key.profile for entry in cache.entries()}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    large = EngineCache(tmp_path)
    one = fill(large, 1)[0]
    overhead = (one.folder / "entry.json").stat().st_size
    fill(large, 4)
    small = EngineCache(tmp_path, max_bytes=4 * (1000 + overhead) + 200)
    assert small.get_or_build(keys(1)[0], never)  # now rows=2 is the oldest
    new = replace(KEY, profile="rows=9")
    small.get_or_build(new, lambda folder: (folder / "engine").write_bytes(bytes(1000)) and None)
    assert profiles(small) == {"rows=1", "rows=3", "rows=4", "rows=9"}
    assert [entry.key.profile for entry in small.entries()] == ["rows=9", "rows=1", "rows=4", "rows=3"]
    removed = small.prune(2 * (1000 + overhead) + 100)
    assert [entry.key.profile for entry in removed] == ["rows=3", "rows=4"]
    assert [entry.bytes for entry in removed] == [1000, 1000]
    assert profiles(small) == {"rows=1", "rows=9"}
    assert small.prune() == []
    assert hidden(small) == []


def test_what_was_just_built_stays_however_large(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=10)
    for key in keys(3):
        cache.get_or_build(key, builds(bytes(1000)))
        assert profiles(cache) == {key.profile}


def test_what_is_locked_stays(cache: EngineCache) -> None:
    entries = fill(cache, 3)
    with cache.held(entries[0].key):
        assert [entry.key.profile for entry in cache.prune(0)] == ["rows=2", "rows=3"]
        cache.get_or_build(entries[0].key, never)
    assert [entry.key.profile for entry in cache.prune(0)] == ["rows=1"]


def test_damaged_entries_count_and_go_too(cache: EngineCache) -> None:
    entries = fill(cache, 3)
    (entries[0].folder / "entry.json").write_text("{}")
    os.utime(entries[0].folder / "entry.json", (0, 0))
    assert profiles(cache) == {"rows=2", "rows=3"}
    before = cache.disk_bytes()
    assert cache.prune(before - 1) == []
    assert visible(cache) == sorted(entry.folder.name for entry in entries[1:])
    assert cache.disk_bytes() == before - 1002


def test_a_build_may_need_another_entry(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=0)
    onnx = replace(KEY, runtime="onnx")

    def build(folder: Path) -> None:
        (folder / "engine").write_bytes(b"x" * 100)
        graph = cache.get_or_build(onnx, builds(b"graph"))
        with cache.held(onnx):
            cache.prune(0)
            (folder / "graph").write_bytes((graph.folder / "model.onnx").read_bytes())

    entry = cache.get_or_build(KEY, build)
    assert (entry.folder / "graph").read_bytes() == b"graph"
    assert (entry.folder / "engine").stat().st_size == 100


def test_what_is_used_while_room_is_made_stays(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = fill(cache, 3)
    read_entry = cache_module.read_entry

    def used_by_another_process(folder: Path) -> CacheEntry:
        os.utime(entries[0].folder / "entry.json")
        return read_entry(folder)

    monkeypatch.setattr(cache_module, "read_entry", used_by_another_process)
    assert [entry.key.profile for entry in cache.prune(cache.disk_bytes() - 1)] == ["rows=2"]
    assert profiles(cache) == {"rows=1", "rows=3"}
