"""The built-in catalog's engines, built for real with TensorRT-RTX, which needs no CUDA device for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from catimage_accel.catalog import Catalog
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component
from catimage_accel.engines.planning import shape_profile
from catimage_accel.engines.tensorrt import RUNTIMES
from catimage_accel.engines.tensorrt.api import TENSORRT_RTX
from catimage_accel.engines.tensorrt.layers import LayerTable
from catimage_accel.quantize import Quantization

pytestmark = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT-RTX is not installed")


def built(component: Component, cache: EngineCache, *rows: int) -> LayerTable:
    """What the builder told of its layers."""
    profile = shape_profile(component.model, component.unet, rows)
    [entry] = RUNTIMES["tensorrt-rtx"].runner(component, profile, cache, torch.device("cpu")).build()
    table = LayerTable.load(entry.folder)
    assert table is not None
    return table


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load("emoji", verify=False)


@pytest.mark.parametrize(
    ("name", "unet"), [("small-dpm-8-int8", "unet_small"), ("teacher-dpm-10-int8", "unet")], ids=["small", "teacher"]
)
def test_the_shipped_scales_put_weights_in_as_int8(catalog: Catalog, name: str, unet: str, tmp_path: Path) -> None:
    candidate = catalog.candidate(name)
    assert candidate.quantization is not None
    scales = catalog.resolve_model(candidate.quantization)
    model = catalog.resolve_model(candidate.model)
    table = built(Component(model, "unet", unet, "int8", scales), EngineCache(tmp_path), 2)
    quantization = Quantization.load(scales)
    assert len(table.quantized_weights) == len(quantization.layers)
    assert table.multiplying("INT8")
    assert len(table.multiplying()) > len(table.multiplying("INT8")), "the layers kept in high precision are there"


def test_an_engine_in_float32_has_no_int8(catalog: Catalog, tmp_path: Path) -> None:
    table = built(Component(catalog.resolve_model("model"), "unet", "unet_small"), EngineCache(tmp_path), 2)
    assert table.quantized_weights == {}
    assert {layer.precision for layer in table.multiplying()} == {"FP32"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_part_is_built(catalog: Catalog, precision: str, tmp_path: Path) -> None:
    model, cache = catalog.resolve_model("model"), EngineCache(tmp_path)
    for name, unet in (("unet", "unet"), ("unet", "unet_small"), ("unet-shallow", "unet"), ("vae_decoder", "unet")):
        table = built(Component(model, name, unet, precision), cache, 2, 8)
        assert {layer.precision for layer in table.multiplying()} <= {precision.upper(), "FP32"}
        assert table.multiplying(precision.upper())
