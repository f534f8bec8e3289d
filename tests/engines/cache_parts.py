"""A key, builds and looks at the folder for the tests of the engine cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from catimage_accel.engines.cache import EngineCache, EngineKey

KEY = EngineKey(
    model_sha256="ab" * 32, component="unet", precision="int8", quantization="cd" * 32,
    profile="rows=8,height=16,width=16,tokens=24", runtime="openvino", runtime_version="2026.4.1",
    device="cpu: AMD EPYC avx512_vnni", os="linux x86_64",
)  # fmt: skip


def builds(content: bytes = b"engine", log: list[bytes] | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "model.onnx").write_bytes(content)
        (folder / "weights").mkdir()
        (folder / "weights" / "data.bin").write_bytes(content * 3)
        if log is not None:
            log.append(content)

    return build


def never(folder: Path) -> None:
    raise AssertionError("built although there is an entry")


def visible(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.startswith("."))


def hidden(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if re.match(r"\.(building|removed)", path.name))


def keys(number: int) -> list[EngineKey]:
    return [replace(KEY, profile=f"rows={rows}") for rows in range(1, number + 1)]
