"""The cache of built engines on disk: built once, by one process, checked before every use, the oldest thrown away.

An entry is a folder named by the digest of its :class:`EngineKey`. It is built in a hidden folder beside it and then
renamed, so it is there as a whole or not at all. One lock a digest, which the system releases when its holder dies,
says who builds or removes; a hidden folder whose lock is free is what a killed process left.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from catimage_accel.engines.cache_entry import (
    RECORD_FILE,
    CacheEntry,
    EngineKey,
    check_files,
    read_entry,
    read_record,
    seal,
    to_disk,
)
from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["CacheEntry", "EngineCache", "EngineKey"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_HIDDEN = re.compile(r"\.(?:building|removed)-([0-9a-f]{64})-[0-9a-f]{8}")
_LOCKS = ".locks"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_DAMAGE = (ValueError, FileNotFoundError)

_hashed: dict[Path, tuple[Any, ...]] = {}  # what this process has hashed, shared by all caches over a folder
_log = logging.getLogger(__name__)


class EngineCache:
    """Built engines under ``folder``, by default $CATIMAGE_ENGINE_CACHE or "engines" in the user's cache folder.

    After every build the least recently used entries go until at most ``max_bytes`` (default: 10^9 times
    $CATIMAGE_ENGINE_CACHE_GB, or 20 x 10^9) are left, the one just built and those that are locked excepted. Threads
    and processes may share a folder. A folder that can be read only serves what it holds.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int | None = None) -> None:
        """Raises ValueError if one of the variables, or ``max_bytes``, can't be meant. Writes nothing."""
        self.folder = _default_folder() if folder is None else Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the engine cache {self.folder} is a file; accepted: a folder (CATIMAGE_ENGINE_CACHE)")
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; accepted: a whole number from 0")
        self.max_bytes = _default_max_bytes() if max_bytes is None else max_bytes

    def get_or_build(self, key: EngineKey, build: Callable[[Path], None]) -> CacheEntry:
        """The entry of ``key``; if there is none that is whole, ``build`` fills an empty folder that becomes it.

        A key is built by one thread of one process at a time; the others wait and use what it built. A damaged entry
        is removed with one UserWarning that says what was wrong with it. What ``build`` raises is raised, and nothing
        of it stays; :class:`EngineUnavailable` if the disk is full or ``folder`` can't be written.
        """
        try:
            if (entry := self.find(key)) is not None:
                return entry
            with self.held(key):
                entry = self._checked(key) or self._built(key, build)
        except OSError as error:
            if (reason := self._unavailable(error)) is None:
                raise
            raise EngineUnavailable(f"no {key.component} for {key.runtime}: {reason}") from error
        with suppress(OSError):
            self._evict(self.max_bytes, keep=key.digest)
        return entry

    def find(self, key: EngineKey) -> CacheEntry | None:
        """The entry of ``key``, checked and marked as used now; None if there is none that is whole."""
        folder = self.folder / key.digest
        try:
            check_files(folder, read_record(folder), _hashed)
            with suppress(OSError):
                os.utime(folder / RECORD_FILE)
            return read_entry(folder)
        except _DAMAGE:
            return None

    def discard(self, key: EngineKey) -> None:
        """Removes the entry of ``key``: whole, but of no use to the library that it is for."""
        with self.held(key):
            if os.path.lexists(folder := self.folder / key.digest):
                self._discard(folder)

    @contextmanager
    def held(self, key: EngineKey) -> Iterator[None]:
        """While this lasts no other thread or process builds or removes the entry of ``key``."""
        lock = self._lock(key.digest, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("waiting for another process that builds %s for %s", key.component, key.runtime)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def entries(self) -> list[CacheEntry]:
        """All entries whose record can be read, last used first; their files are not looked at."""
        found = []
        for folder in self._folders():
            with suppress(ValueError, OSError):
                found.append(read_entry(folder))
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def disk_bytes(self) -> int:
        """What the folder takes, leftovers and damaged entries included."""
        return _bytes(self.folder)

    def verify(self) -> list[str]:
        """Hashes every file of every entry; one line, which starts with its digest, for each that is not whole."""
        problems = []
        for folder in self._folders():
            try:
                check_files(folder, read_record(folder), {})
            except (ValueError, OSError) as error:
                if os.path.lexists(folder):
                    problems.append(f"{folder.name}: {error}")
        return problems

    def prune(self, max_bytes: int | None = None) -> list[CacheEntry]:
        """Removes the least recently used entries until at most ``max_bytes`` (default: the cache's) are left.

        Damaged entries count and go like others, but only those whose record can be read are returned.
        """
        if not self.folder.is_dir():
            return []
        self._remove_leftovers()
        return self._evict(self.max_bytes if max_bytes is None else max_bytes)

    def _checked(self, key: EngineKey) -> CacheEntry | None:
        """Under the key's lock: its entry if it is whole; if it isn't, it is removed and a warning says why."""
        if (entry := self.find(key)) is not None:
            return entry
        folder = self.folder / key.digest
        if not os.path.lexists(folder):
            return None
        try:
            check_files(folder, read_record(folder), {})
        except _DAMAGE as error:
            problem = str(error)
        else:
            return self.find(key)
        self._discard(folder)
        warnings.warn(
            f"the {key.component} for {key.runtime} in the engine cache is built again: {problem} ({folder})",
            UserWarning, stacklevel=3,
        )  # fmt: skip
        return None

    def _built(self, key: EngineKey, build: Callable[[Path], None]) -> CacheEntry:
        """Under the key's lock: builds its entry."""
        self._remove_leftovers(mine=key.digest)
        folder = self.folder / key.digest
        hidden = self.folder / f".building-{key.digest}-{uuid.uuid4().hex[:8]}"
        hidden.mkdir()
        try:
            start = time.perf_counter()
            build(hidden)
            seal(hidden, key, time.perf_counter() - start)
            os.rename(hidden, folder)
        finally:
            _delete(hidden)
        to_disk(self.folder)
        return read_entry(folder)

    def _evict(self, limit: int, keep: str | None = None) -> list[CacheEntry]:
        removed = []
        # One at a time: two that count at once would each make the same room.
        with self._lock("evict"):
            stored = sorted((_last_used(folder), _bytes(folder), folder) for folder in self._folders())
            total = sum(size for _, size, _ in stored)
            for used, size, folder in stored:
                if total <= limit:
                    break
                if folder.name == keep:
                    continue
                entry = None
                with suppress(ValueError, OSError):
                    entry = read_entry(folder)
                with suppress(Timeout), self._lock(folder.name).acquire(timeout=0):
                    if _last_used(folder) != used:  # used or gone since it was counted
                        continue
                    self._discard(folder)
                    total -= size
                    removed += [entry] if entry else []
        return removed

    def _remove_leftovers(self, mine: str | None = None) -> None:
        """Removes what killed processes left; ``mine`` is a digest whose lock the caller holds."""
        for path in self.folder.iterdir():
            if match := _HIDDEN.fullmatch(path.name):
                if match[1] == mine:
                    _delete(path)
                    continue
                with suppress(Timeout), self._lock(match[1]).acquire(timeout=0):
                    _delete(path)

    def _discard(self, folder: Path) -> None:
        """Under the folder's lock: renamed first, so that nobody finds half of it."""
        hidden = self.folder / f".removed-{folder.name}-{uuid.uuid4().hex[:8]}"
        os.rename(folder, hidden)
        _delete(hidden)

    def _lock(self, name: str, is_singleton: bool = False) -> FileLock:
        """The lock of a digest. A singleton lets its thread in again; a plain one tells who holds it, oneself too."""
        locks = self.folder / _LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name}.lock", is_singleton=is_singleton)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _DIGEST.fullmatch(path.name))

    def _unavailable(self, error: OSError) -> str | None:
        """What is wrong with the cache's disk and what to do about it; None if ``error`` is of something else."""
        if error.errno in _FULL:
            return (
                f"the disk is full ({error}); make room, as `catimage engine prune --all` does, or set "
                f"CATIMAGE_ENGINE_CACHE, now {self.folder}, to a folder on another disk"
            )
        place = Path(os.fsdecode(error.filename)) if error.filename is not None else None
        own = place is not None and (place.is_relative_to(self.folder) or self.folder.is_relative_to(place))
        if error.errno in _UNWRITABLE and own:
            return f"{self.folder} can't be written ({error.strerror}); set CATIMAGE_ENGINE_CACHE to a folder that can"
        if error.errno == errno.ENOLCK:
            return f"{self.folder} can't be locked ({error.strerror}); set CATIMAGE_ENGINE_CACHE to a local folder"
        return None


def _delete(path: Path) -> None:
    """Removes a hidden folder as far as it can be; what stays is a leftover to the next build."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _last_used(folder: Path) -> float:
    for path in (folder / RECORD_FILE, folder):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _bytes(folder: Path) -> int:
    """What is under ``folder``, whether its record can be read or not."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total


def _default_folder() -> Path:
    from platformdirs import user_cache_path

    if chosen := os.environ.get("CATIMAGE_ENGINE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return user_cache_path("catimage-accel") / "engines"


def _default_max_bytes() -> int:
    text = os.environ.get("CATIMAGE_ENGINE_CACHE_GB") or "20"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ValueError(f"CATIMAGE_ENGINE_CACHE_GB is {text!r}; accepted: gigabytes, a number from 0")
    return int(gigabytes * 10**9)
