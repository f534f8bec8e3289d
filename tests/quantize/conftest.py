"""A tiny UNet, inputs for it, and quantizations of it by real ModelOpt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from catimage_accel.quantize import Quantization, UNetInputs, calibrate, weights_sha256


def load_unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)


def random_inputs(rows: int, seed: int = 0) -> UNetInputs:
    made = torch.Generator().manual_seed(seed)
    return UNetInputs(
        torch.randn(rows, 4, 16, 16, generator=made), torch.linspace(0, 999, rows),
        torch.randn(rows, 24, 32, generator=made),
    )  # fmt: skip


@pytest.fixture
def unet(tiny_sd_folder: Path) -> Any:
    return load_unet(tiny_sd_folder)


@pytest.fixture(scope="session")
def calibrated(tiny_sd_folder: Path) -> Callable[..., Quantization]:
    """``calibrated(recipe, percentile, outputs)``: the tiny UNet's quantization; made once each."""

    @cache
    def make(recipe: str = "int8", percentile: float = 100.0, outputs: bool = True) -> Quantization:
        return calibrate(
            load_unet(tiny_sd_folder), recipe, random_inputs(8).batches(4), percentile=percentile, outputs=outputs,
            source_sha256=weights_sha256(tiny_sd_folder), calibration={"prompts": 3},
        )  # fmt: skip

    return make


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
