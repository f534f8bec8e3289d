"""Repositories in a hub cache, as a download would leave them."""

from __future__ import annotations

import shutil
from pathlib import Path


def in_hub(hub: Path, name: str, folder: Path, *files: str) -> Path:
    """The snapshot of the repository ``name`` in the cache, with ``folder``'s files, or those named."""
    commit = "0" * 40
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in files or [path.name for path in folder.iterdir()]:
        shutil.copy(folder / file, snapshot / file)
    return snapshot
