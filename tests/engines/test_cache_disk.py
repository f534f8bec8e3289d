"""What the engine cache makes of disks that are full or can't be written, and of its environment variables."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_parts import KEY, builds, hidden, never, visible

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def fill_the_disk(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"x")
    Path("/dev/full").write_bytes(b"x")


def raise_no_quota(folder: Path) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("build", [pytest.param(fill_the_disk, id="disk"), pytest.param(raise_no_quota, id="quota")])
def test_a_full_disk_makes_an_engine_unavailable(cache: EngineCache, build: Callable[[Path], None]) -> None:
    with pytest.raises(EngineUnavailable, match=r"the disk is full.*CATIMAGE_ENGINE_CACHE") as raised:
        cache.get_or_build(KEY, build)
    assert "\n" not in str(raised.value)
    assert str(cache.folder) in str(raised.value)
    assert visible(cache) == hidden(cache) == []


@pytest.mark.parametrize(
    "folder",
    [pytest.param("/sys/catimage/engines", id="kernel's"), pytest.param("/dev/null/engines", id="below-a-file")],
)
def test_a_folder_that_can_not_be_written_makes_an_engine_unavailable(folder: str) -> None:
    with pytest.raises(EngineUnavailable, match=f"{folder} can't be written.*CATIMAGE_ENGINE_CACHE"):
        EngineCache(Path(folder)).get_or_build(KEY, builds())


def test_other_errors_of_the_system_are_the_builds_own(cache: EngineCache) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.safetensors"):
        cache.get_or_build(KEY, lambda folder: Path("no-such.safetensors").open().close())
    with pytest.raises(PermissionError):
        cache.get_or_build(KEY, lambda folder: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no", "/other")))


def test_an_entry_is_served_from_a_folder_that_can_only_be_read(cache: EngineCache) -> None:
    entry = cache.get_or_build(KEY, builds(b"shared"))
    inside = [*cache.folder.rglob("*"), cache.folder]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert as_nobody(cache.folder, lambda: read_only(cache)) == entry.key.digest
    finally:
        for path in reversed(inside):
            path.chmod(0o755 if path.is_dir() else 0o644)


def read_only(cache: EngineCache) -> str:
    entry = cache.get_or_build(KEY, never)
    assert (entry.folder / "model.onnx").read_bytes() == b"shared"
    with pytest.raises(EngineUnavailable, match=r"can't be written.*CATIMAGE_ENGINE_CACHE"):
        cache.get_or_build(replace(KEY, precision="fp32"), never)
    with pytest.raises(PermissionError):
        cache.prune(0)
    return entry.folder.name


def as_nobody(folder: Path, work: Callable[[], str]) -> str:
    """What ``work`` returns, or the text of what it raises, in a child process that isn't root, which may write all."""
    if os.getuid() != 0:
        return work()
    closed = [path for path in folder.parents if not path.stat().st_mode & 0o001]
    temporary = Path(tempfile.gettempdir()).resolve()
    if not all(path.resolve().is_relative_to(temporary) for path in closed):
        pytest.skip(f"nobody but root gets at {folder}")
    modes = {path: path.stat().st_mode for path in closed}
    reader, writer = os.pipe()
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    try:
        if (child := os.fork()) == 0:
            try:
                os.setuid(65534)
                text = work()
            except BaseException as error:
                text = repr(error)
            os.write(writer, text.encode())
            os._exit(0)
        os.waitpid(child, 0)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        os.close(writer)
    with os.fdopen(reader) as stream:
        return stream.read()


def test_the_environment_names_folder_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path / "there"))
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE_GB", "0.5")
    cache = EngineCache()
    assert cache.folder == tmp_path / "there"
    assert cache.max_bytes == 500_000_000
    assert not cache.folder.exists()
    assert cache.entries() == cache.verify() == cache.prune(0) == []
    assert cache.find(KEY) is None
    assert not cache.folder.exists()
    assert EngineCache(tmp_path / "here", max_bytes=7).max_bytes == 7
    monkeypatch.delenv("CATIMAGE_ENGINE_CACHE")
    monkeypatch.delenv("CATIMAGE_ENGINE_CACHE_GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert EngineCache().max_bytes == 20 * 10**9
    if sys.platform == "linux":
        assert EngineCache().folder == tmp_path / "cache" / "catimage-accel" / "engines"


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "20 GB", "1e400"])
def test_a_size_that_can_not_be_meant_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE_GB", value)
    with pytest.raises(ValueError, match=f"CATIMAGE_ENGINE_CACHE_GB is '{value}'; accepted: gigabytes"):
        EngineCache()


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; accepted: a folder"):
        EngineCache(tmp_path / "file")
