"""A tiny UNet, and quantizations of it by real ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from quantize_parts import load_unet, random_inputs

from catimage_accel.quantize import Quantization, calibrate, weights_sha256


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
