"""Pictures as files: encoded, and for a while to be had under names that nobody can guess."""

from __future__ import annotations

import errno
import io
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

__all__ = ["OutputFormat", "PictureStore", "encode"]

OutputFormat = Literal["png", "jpeg", "webp"]


def encode(pixels: np.ndarray, output_format: OutputFormat) -> bytes:
    """The file of uint8 (height, width, 3)."""
    file = io.BytesIO()
    quality = {} if output_format == "png" else {"quality": 95}
    Image.fromarray(pixels).save(file, output_format, **quality)
    return file.getvalue()


@dataclass(frozen=True)
class _Stored:
    path: Path
    size: int
    until: float


class PictureStore:
    """Keeps files in ``folder`` for ``seconds``, at most ``max_bytes`` of them: the oldest go first.

    Names are drawn here and looked up in a table: no path is ever made from what a client sends.
    """

    def __init__(self, folder: Path, *, seconds: float = 3600.0, max_bytes: int = 2**28) -> None:
        self._folder = folder
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._files: OrderedDict[str, _Stored] = OrderedDict()
        self._bytes = 0

    def add(self, data: bytes, output_format: OutputFormat) -> str:
        """Writes a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        path = self._folder / name
        self._write(path, data)
        self._files[name] = _Stored(path, len(data), time.monotonic() + self._seconds)
        self._bytes += len(data)
        self._drop_old()
        return name

    def _write(self, path: Path, data: bytes) -> None:
        """On a full disk at the cost of older pictures; what can't be written whole is not there."""
        while True:
            try:
                path.write_bytes(data)
                return
            except OSError as error:
                path.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._files:
                    raise
                self._drop_oldest()

    def find(self, name: str) -> Path | None:
        """The file of that name, None if there is none or its time is over."""
        self._drop_old()
        stored = self._files.get(name)
        return None if stored is None else stored.path

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._files:
            oldest = next(iter(self._files.values()))
            if oldest.until > now and (self._bytes <= self._max_bytes or len(self._files) == 1):
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, oldest = self._files.popitem(last=False)
        self._bytes -= oldest.size
        oldest.path.unlink(missing_ok=True)
