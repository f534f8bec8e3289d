"""A cache of built engines, and a quantization of the tiny UNet, for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from tiny_unets import measured, unet_inputs

from catimage_accel.engines.cache import EngineCache


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engine-cache"))


@pytest.fixture(scope="session")
def tiny_unet(tiny_sd_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet").eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_int8(tiny_sd_folder: Path, tiny_unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an INT8 quantization of all layers of the tiny UNet but the first and the last."""
    folder = tmp_path_factory.mktemp("quantization") / "int8"
    measured(tiny_sd_folder, tiny_unet, unet_inputs(8)).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_fp8(tiny_sd_folder: Path, tiny_unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantization") / "fp8"
    measured(tiny_sd_folder, tiny_unet, unet_inputs(8), format="fp8").save(folder)
    return folder
