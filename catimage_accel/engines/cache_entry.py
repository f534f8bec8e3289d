"""One entry of the engine cache on disk: what it was built for, its files, and the check that they are still those."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field

from catimage_accel.storage import FileChecksum, Strict, file_sha256, read_json, validated, write_atomic

__all__ = [
    "RECORD_FILE",
    "CacheEntry",
    "EngineKey",
    "EntryRecord",
    "check_files",
    "read_entry",
    "read_record",
    "seal",
    "to_disk",
]

RECORD_FILE = "entry.json"
_FORMAT = 1
_CLOCK_TICK = 0.1  # seconds; a file changed twice within a tick of the file system's clock shows the same times


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what a built engine computes and where it runs.

    Keys are equal exactly when their :attr:`digest` is; the order of ``options`` does not count. Every field is
    printable text, and none but ``quantization`` (of a component that is not quantized) is empty; ValueError otherwise.
    """

    model_sha256: str
    component: str
    precision: str
    quantization: str
    profile: str
    runtime: str
    runtime_version: str
    device: str
    os: str
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        named = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "options"]
        for name, value in [*named, *(("options", text) for pair in self.options for text in pair)]:
            if not isinstance(value, str) or not value.isprintable():
                raise ValueError(f"{name} is {value!r}; accepted: printable text")
            if not value and name not in ("quantization", "options"):
                raise ValueError(f"{name} is empty; accepted: printable text")
        if len({option for option, _ in self.options}) != len(self.options):
            raise ValueError(f"options is {self.options}; accepted: each option once")
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @property
    def digest(self) -> str:
        """sha256, hexadecimal, of all fields and of the format that entries are kept in."""
        return _sha256({"format": _FORMAT, **asdict(self)})


@dataclass(frozen=True)
class CacheEntry:
    """A built engine on disk: ``folder`` holds its files, ``bytes`` in all, which took ``build_seconds`` to build."""

    key: EngineKey
    folder: Path
    bytes: int
    created: datetime
    last_used: datetime
    build_seconds: float


class _KeyFields(Strict):
    model_sha256: str
    component: str
    precision: str
    quantization: str
    profile: str
    runtime: str
    runtime_version: str
    device: str
    os: str
    options: dict[str, str]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        raise ValueError("it leaves the entry's folder")
    return name


class EntryRecord(Strict):
    """The content of an entry's entry.json. ``sha256`` is of everything else in it, so that an edit shows."""

    format: int
    key: _KeyFields
    created: Annotated[AwareDatetime, Field(strict=False)]
    build_seconds: Annotated[float, Field(ge=0)]
    files: Annotated[dict[Annotated[str, AfterValidator(_inside)], FileChecksum], Field(min_length=1)]
    sha256: str

    @property
    def engine_key(self) -> EngineKey:
        values = self.key.model_dump()
        return EngineKey(**{**values, "options": tuple(values["options"].items())})

    @property
    def bytes(self) -> int:
        """Size of the files, entry.json left out."""
        return sum(file.size for file in self.files.values())


def seal(folder: Path, key: EngineKey, build_seconds: float) -> None:
    """Writes the entry.json of what was built in ``folder`` and has the disk keep all of it.

    Raises ValueError if the build left no file, or one that is called entry.json.
    """
    names = sorted(_files(folder))
    if not names:
        raise ValueError(f"the build of {key.component} for {key.runtime} wrote no file; an entry holds at least one")
    if RECORD_FILE in names:
        raise ValueError(f"the build of {key.component} for {key.runtime} wrote {RECORD_FILE}; that name is taken")
    files = {}
    for name in names:
        to_disk(folder / name)
        files[name] = {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
    values: dict[str, Any] = {
        "format": _FORMAT, "key": {**asdict(key), "options": dict(key.options)},
        "created": datetime.now(UTC).isoformat(), "build_seconds": build_seconds, "files": files,
    }  # fmt: skip
    values["sha256"] = _sha256(values)
    validated(EntryRecord, values, f"what the build of {key.component} for {key.runtime} wrote")
    text = json.dumps(values, indent=1) + "\n"
    write_atomic(folder / RECORD_FILE, text.encode())
    to_disk(folder / RECORD_FILE)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        to_disk(path)


def read_record(folder: Path) -> EntryRecord:
    """The record of the entry in ``folder``, whose name is the digest of the entry's key.

    Raises ValueError, or FileNotFoundError if there is none, saying what is wrong with it.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{RECORD_FILE} is missing")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = repr(values.get("format")) if isinstance(values, dict) else "none"
        raise ValueError(f"{RECORD_FILE}: the format is {found}, this version reads {_FORMAT}")
    record = validated(EntryRecord, values, RECORD_FILE)
    if _sha256({name: value for name, value in values.items() if name != "sha256"}) != record.sha256:
        raise ValueError(f"{RECORD_FILE} was changed after it was written")
    if (digest := record.engine_key.digest) != folder.name:
        raise ValueError(f"{RECORD_FILE} is that of another entry, {digest}")
    return record


def read_entry(folder: Path) -> CacheEntry:
    """The entry in ``folder`` by its record alone, its files not looked at. Raises what :func:`read_record` does."""
    record = read_record(folder)
    used = datetime.fromtimestamp((folder / RECORD_FILE).stat().st_mtime, UTC)
    return CacheEntry(record.engine_key, folder, record.bytes, record.created, used, record.build_seconds)


def check_files(folder: Path, record: EntryRecord, known: dict[Path, tuple[Any, ...]]) -> None:
    """Raises ValueError, or FileNotFoundError, unless ``folder`` holds the files of ``record`` and no others.

    ``known`` remembers what was hashed; a file whose inode, size and times are still the same is not hashed again.
    """
    for name, expected in record.files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{name} is missing")
        status = file.stat()
        if status.st_size != expected.size:
            state = "truncated" if status.st_size < expected.size else "changed"
            raise ValueError(f"{name} is {state}: it has {status.st_size} bytes, {RECORD_FILE} says {expected.size}")
        state_now = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, expected.sha256)
        if known.get(file) == state_now:
            continue
        if (digest := file_sha256(file)) != expected.sha256:
            raise ValueError(f"{name} was changed: its sha256 is {digest}, {RECORD_FILE} says {expected.sha256}")
        if time.time() - status.st_ctime > _CLOCK_TICK:
            known[file] = state_now
    # Network file systems keep hidden files for what was deleted while open; nobody loads those.
    extra = sorted(name for name in _files(folder) if name not in record.files and not Path(name).name.startswith("."))
    if extra != [RECORD_FILE]:
        raise ValueError(f"{next(name for name in extra if name != RECORD_FILE)} is there, but not in {RECORD_FILE}")


def to_disk(path: Path) -> None:
    """Has the disk keep a file's content, or the names in a folder, where the system can be asked to."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
