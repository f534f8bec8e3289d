"""The tiny UNet, its quantization, and the engine over both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from int8_unets import KEPT, measured_layers

from catimage_accel.engines import EagerEngine
from catimage_accel.engines.triton_int8 import TritonInt8Engine
from catimage_accel.kernels import tuning
from catimage_accel.quantize.quantization import Quantization, weights_sha256


@pytest.fixture(scope="module")
def eager(tiny_sd_folder: Path) -> EagerEngine:
    return EagerEngine(tiny_sd_folder)


@pytest.fixture(scope="module")
def saved(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(outputs=, smooth=, separate_heads=)``: a folder with the quantization of the tiny UNet."""
    folders: dict[tuple[bool, ...], Path] = {}

    def save(outputs: bool = False, smooth: bool = False, separate_heads: bool = False) -> Path:
        key = (outputs, smooth, separate_heads)
        if key not in folders:
            layers = measured_layers(
                EagerEngine(tiny_sd_folder), outputs=outputs, smooth=smooth, separate_heads=separate_heads
            )
            folders[key] = tmp_path_factory.mktemp("quantized")
            Quantization("int8", "int8", layers, KEPT, weights_sha256(tiny_sd_folder)).save(folders[key])
        return folders[key]

    return save


@pytest.fixture(scope="module")
def engine(tiny_sd_folder: Path, saved: Callable[..., Path]) -> TritonInt8Engine:
    return TritonInt8Engine(tiny_sd_folder, quantization=saved())


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Writes what was measured of an op on the device "chip", which every device is."""
    defaults = {path.name: path.read_text() for path in tuning.FOLDER.glob("*.default.json")}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "device_slug", lambda device: "chip")
    for name, text in defaults.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name.replace("default", "chip")).write_text(text)
    tuning.forget()

    def write(op: str, entries: Any) -> None:
        (tmp_path / f"{op}.chip.json").write_text(json.dumps(entries))
        tuning.forget()

    yield write
    tuning.forget()


