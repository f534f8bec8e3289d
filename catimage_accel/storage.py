"""Files that can be trusted: strict reading, atomic writing, and the checksums of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUMS_FILE = "checksums.json"


class Strict(BaseModel):
    """A record that refuses unknown keys, converted types, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FileChecksum(Strict):
    """What a file's content has to be."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class _ChecksumFields(Strict):
    files: dict[Annotated[str, Field(pattern=r"^[^/\\][^\\]*$")], FileChecksum]


Model = TypeVar("Model", bound=Strict)


def validated(model: type[Model], values: Any, where: str) -> Model:
    """``model`` of ``values``; the first thing wrong with them raises ValueError in one line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt key also shows as a missing one: the key that is there says more.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        first = problems[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        if first["type"] == "extra_forbidden":
            known = ", ".join(_model_at(model, first["loc"][:-1]).model_fields)
            text = f"{place} is {first['input']!r}, but there is no such key; accepted: {known}"
        elif first["type"] == "missing":
            text = f"{place} is missing"
        else:
            text = f"{place} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {text}{more}") from None


def _model_at(model: type[Strict], place: Iterable[int | str]) -> type[Strict]:
    """The record type nested in ``model`` at a pydantic error's location."""
    for part in place:
        if part in model.model_fields:
            kinds: list[Any] = [model.model_fields[str(part)].annotation]
            while kinds:
                kind = kinds.pop()
                if isinstance(kind, type) and issubclass(kind, Strict):
                    model = kind
                kinds += get_args(kind)
    return model


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError in one line if it is not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def read_toml(path: Path, wanted: str) -> dict[str, Any]:
    """The values in a TOML file; FileNotFoundError, which says what is ``wanted``, or ValueError, one line each."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file in the same way."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, dict(metadata or {}))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which it replaces in the end; removed if it can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def verify_files(folder: Path) -> None:
    """Checks ``folder`` against its checksums.json, if it has one."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    for name, expected in validated(_ChecksumFields, read_json(path), str(path)).files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {CHECKSUMS_FILE} lists it with {expected.size} bytes")
        if (size := file.stat().st_size) != expected.size:
            state = "truncated" if size < expected.size else "changed"
            raise ValueError(f"{file} is {state}: it has {size} bytes, {CHECKSUMS_FILE} says {expected.size}")
        if (digest := file_sha256(file)) != expected.sha256:
            raise ValueError(f"{file} was changed: its sha256 is {digest}, {CHECKSUMS_FILE} says {expected.sha256}")


def write_checksums(folder: Path) -> None:
    """Lists size and sha256 of every file under ``folder`` (hidden ones left out) in its checksums.json."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() != CHECKSUMS_FILE:
            files[name.as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
    write_atomic(folder / CHECKSUMS_FILE, (json.dumps({"files": files}, indent=1) + "\n").encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
