"""The command's files: prompts in; pictures and routes.jsonl out."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    from PIL import Image

    from catimage_accel.pipeline import Route

ROUTES_FILE = "routes.jsonl"
_NUMBERED = re.compile(r"(\d+)-.*\.png")


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """The prompts of a text file, one a line, and a report of each line that is none.

    Blank lines are skipped. A line that is not UTF-8 or holds control characters is reported, as "FILE:LINE: ...".
    FileNotFoundError without the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts is {str(path)!r}, which is not a file; accepted: text, one prompt a line")
    prompts, problems = [], []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            problems.append(f"{path}:{number}: {line[:60]!r} is not UTF-8; left out")
            continue
        if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text):
            problems.append(f"{path}:{number}: {text[:60]!r} has control characters; left out")
        elif text:
            prompts.append(text)
    return prompts, problems


def check_output(option: str, path: Path) -> None:
    """Raises ValueError, before work starts, where ``path`` could not be written after it. Makes nothing."""
    if path.is_dir():
        raise ValueError(f"{option} is the folder {str(path)!r}; accepted: a file")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "can't be written" if nearest.is_dir() else "is no folder"
        raise ValueError(f"{option} is {str(path)!r}, but {nearest} {why}; accepted: a file in a folder of yours")


def slug(prompt: str) -> str:
    """``prompt`` as part of a file name: a-z, 0-9 and hyphens, 48 characters at most."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:48].strip("-") or "picture"


class OutFolder:
    """Where pictures go: ``0007-a-dog.png`` and a line of routes.jsonl each, the picture first.

    Numbers go on after those in the folder, so that no earlier picture is overwritten; ``fresh`` starts again at 0 and
    with an empty routes.jsonl. ValueError if the folder can't be written.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self._fresh = fresh
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / ".writable", b"")
            (folder / ".writable").unlink()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ValueError(
                f"out is {str(folder)!r}: {reason}; accepted: a folder that can be created and written"
            ) from None
        numbers = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
        self.first = 0 if fresh else max(numbers, default=-1) + 1

    def begin(self) -> None:
        """Readies routes.jsonl: emptied for a fresh run, else rid of the half line that a power cut may have left."""
        routes = self.routes_path.read_bytes() if self.routes_path.exists() else b""
        kept = b"" if self._fresh else routes[: routes.rfind(b"\n") + 1]
        if kept != routes:
            write_atomic(self.routes_path, kept)

    @property
    def routes_path(self) -> Path:
        return self.folder / ROUTES_FILE

    def add(self, position: int, picture: Image.Image, route: Route) -> dict[str, Any]:
        """Writes the picture at ``position`` of this run and its row, which is returned."""
        number = self.first + position
        path = self.folder / f"{number:04d}-{slug(route.prompt)}.png"
        content = io.BytesIO()
        picture.save(content, "PNG")
        write_atomic(path, content.getvalue())
        row = {"index": number, "file": path.name, **route.as_dict()}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        # One write to a file opened for appending: other writers and a crash never see half a line.
        descriptor = os.open(self.routes_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        return row
