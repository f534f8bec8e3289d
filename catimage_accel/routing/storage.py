"""A router on disk: ``router.json`` (what it is) and ``router.safetensors`` (its arrays). Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

JSON_NAME, TENSORS_NAME = "router.json", "router.safetensors"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class SavedRouter:
    """What a router writes and reads: its kind, candidates, plain settings and arrays; it lies in ``folder``."""

    kind: str
    candidates: tuple[str, ...]
    settings: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    folder: Path

    def write(self) -> None:
        """Write both files, each at once or not at all. The JSON, written last, holds the other's SHA-256."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in self.tensors.items()})
        described = {
            "format": FORMAT,
            "kind": self.kind,
            "candidates": list(self.candidates),
            "settings": dict(self.settings),
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _replace(self.folder / TENSORS_NAME, data)
        _replace(self.folder / JSON_NAME, text.encode())

    @classmethod
    def read(cls, folder: str | Path) -> SavedRouter:
        """FileNotFoundError for a missing file, ValueError for one that is not what was written."""
        folder = Path(folder)
        for name in (JSON_NAME, TENSORS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}, expected a router's folder")
        try:
            described = json.loads((folder / JSON_NAME).read_bytes())
            version, kind = described["format"], str(described["kind"])
            candidates, settings = tuple(described["candidates"]), dict(described["settings"])
            digest = described["tensors_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / JSON_NAME} is not a router's description: {error!r}") from error
        if version != FORMAT:
            raise ValueError(f"{folder / JSON_NAME} has format {version!r}, expected {FORMAT}")
        data = (folder / TENSORS_NAME).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{folder / TENSORS_NAME} is not the file that {JSON_NAME} names (SHA-256 differs)")
        try:
            tensors = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / TENSORS_NAME} is not a safetensors file: {error}") from error
        return cls(kind, candidates, settings, tensors, folder)

    def tensor(self, name: str, shape: Sequence[int | None]) -> np.ndarray:
        """The array of this name as float64; ValueError when it is missing or its shape differs (None: any length)."""
        array = self.tensors.get(name)
        found = None if array is None else array.shape
        if (
            array is None
            or array.ndim != len(shape)
            or any(want not in (None, length) for want, length in zip(shape, array.shape, strict=True))
            or not np.isfinite(array).all()
        ):
            raise ValueError(f"{self.folder / TENSORS_NAME}: {name} has shape {found}, expected finite {tuple(shape)}")
        return array.astype(np.float64)


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
