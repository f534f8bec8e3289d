"""TensorRT's libraries as they may be found: missing, broken, too old, without a device; and how their layers read."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.tensorrt import RUNTIMES
from catimage_accel.engines.tensorrt.api import TENSORRT, TENSORRT_RTX, Library
from catimage_accel.engines.tensorrt.layers import Layer, LayerTable, layers_of_inspector, layers_of_log

CPU = torch.device("cpu")
TINY = ShapeProfile((2,), height=16, width=16, tokens=24, text_features=32)
FIND_SPEC = "catimage_accel.engines.tensorrt.api.find_spec"

needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT-RTX is not installed")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_library_is_told_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, cache: EngineCache
) -> None:
    monkeypatch.setattr(FIND_SPEC, lambda package: None)
    expected = rf"is not installed; pip install 'catimage-accel\[{name}\]'$"
    reason = RUNTIMES[name].why_not(torch.device("cuda"))
    assert reason is not None
    with pytest.raises(EngineUnavailable, match=expected):
        raise EngineUnavailable(reason)
    with pytest.raises(EngineUnavailable, match=expected):
        RUNTIMES[name].runner(Component(Path(), "unet"), TINY, cache, CPU)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """A package that imports with that version, or does not import at all."""

    def load(package: str) -> Any:
        if version is None:
            raise ImportError("libnvinfer.so.10:\n cannot open shared object file")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(FIND_SPEC, lambda package: SimpleNamespace(origin="there"))
    monkeypatch.setattr(importlib, "import_module", load)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "TensorRT does not load: libnvinfer.so.10: cannot open shared object file; pip install"),
        ("8.6.1", "TensorRT is 8.6.1; accepted: 10 and later, pip install -U"),
        ("", "TensorRT does not load"),
    ],
    ids=["no shared library", "too old", "no version"],
)
def test_a_library_that_is_of_no_use(monkeypatch: pytest.MonkeyPatch, version: str | None, message: str) -> None:
    installed(monkeypatch, version)
    with pytest.raises(EngineUnavailable, match=message):
        TENSORRT.version()


@pytest.mark.parametrize("flagged", [True, False], ids=["TensorRT 10, where typing is a flag", "without the flag"])
def test_networks_are_strongly_typed(monkeypatch: pytest.MonkeyPatch, flagged: bool) -> None:
    flags = SimpleNamespace(STRONGLY_TYPED=1) if flagged else SimpleNamespace()
    module = SimpleNamespace(__version__="10.8", NetworkDefinitionCreationFlag=flags)
    monkeypatch.setattr(FIND_SPEC, lambda package: SimpleNamespace(origin="there"))
    monkeypatch.setattr(importlib, "import_module", lambda package: module)
    builder = SimpleNamespace(create_network=lambda flags: flags)
    assert TENSORRT.create_network(builder) == (2 if flagged else 0)


@pytest.mark.parametrize("name", RUNTIMES)
def test_no_device_is_told_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FIND_SPEC, lambda package: SimpleNamespace(origin="there"))
    reason = RUNTIMES[name].why_not(CPU)
    assert reason is not None
    assert "needs a CUDA device, and the device is cpu" in reason


@needs_rtx
@pytest.mark.parametrize(
    ("capability", "problem"),
    [
        ((7, 0), "needs compute capability 7.5; cuda has 7.0"),
        ((7, 5), None),
        ((8, 9), None),
        ((9, 0), "and later, and cuda has 9.0; use engine 'tensorrt'"),
        ((12, 0), None),
        ((13, 0), None),
    ],
    ids=["Volta", "Turing", "Ada", "Hopper", "Blackwell", "what is to come"],
)
def test_tensorrt_rtx_is_not_for_every_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], problem: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = RUNTIMES["tensorrt-rtx"].why_not(torch.device("cuda"))
    assert (reason is None) if problem is None else (reason is not None and problem in reason)


def test_tensorrt_does_not_build_without_a_device(
    monkeypatch: pytest.MonkeyPatch, tiny_sd_folder: Path, cache: EngineCache
) -> None:
    installed(monkeypatch, "10.8")
    runner = RUNTIMES["tensorrt"].runner(Component(tiny_sd_folder, "unet"), TINY, cache, CPU)
    with pytest.raises(EngineUnavailable, match="TensorRT builds on the CUDA device that is to run the engine"):
        runner.build()


def test_precisions_that_there_are_not(cache: EngineCache) -> None:
    with pytest.raises(ValueError, match="precision is 'int4'; accepted: fp32, fp16, bf16, int8, fp8"):
        RUNTIMES["tensorrt-rtx"].runner(Component(Path(), "unet", precision="int4"), TINY, cache, CPU)


def test_layers_of_the_inspector_of_both_versions() -> None:
    ten = """{"Layers": [
      {"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 36864},
       "Inputs": [{"Name": "x", "Dimensions": [2, 64, 8, 8],
                   "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
       "Outputs": [{"Name": "y", "Dimensions": [2, 64, 8, 8], "Format/Datatype": "Row major linear FP16 format"}]},
      "only a name"], "Bindings": ["x", "y"]}"""
    eleven = """{"Layers": [
      {"Name": "gemm [profile 1]", "LayerType": "gemm",
       "Inputs": [{"Name": "x", "Dimensions": [2, 64], "Datatype": "Half", "Format": "(Linear) Row major"}],
       "Constants": [{"Name": "s", "Dimensions": [1, 64], "Datatype": "Float"},
                     {"Name": "w", "Dimensions": [64, 8], "Datatype": "Int8"}],
       "Outputs": [{"Name": "y", "Dimensions": [2, 8], "Datatype": "BFloat16"}]}], "I/O Tensors": []}"""
    first, name = layers_of_inspector(ten)
    assert first == Layer("conv", "CaskConvolution", ("INT8",), "INT8", ("FP16",))
    assert (first.precision, first.profile, name.precision) == ("INT8", 0, "?")
    [second] = layers_of_inspector(eleven)
    assert second == Layer("gemm [profile 1]", "gemm", ("FP16",), "INT8", ("BF16",))
    assert (second.precision, second.profile) == ("FP16 x INT8", 1), "weights alone in INT8 are not INT8 arithmetic"


def test_layers_survive_being_written(tmp_path: Path) -> None:
    layers = (Layer("a", "gemm", ("INT8",), "INT8", ("FP32",)), Layer("b", "kgen", (), None, ("FP16",)))
    table = LayerTable("log", {"w": 12}, layers)
    assert LayerTable.load(tmp_path) is None
    table.save(tmp_path)
    assert LayerTable.load(tmp_path) == table


def test_other_lines_of_a_log_are_no_layers() -> None:
    assert layers_of_log(["LayerType: gemm", "Name: x, LayerType: gemm", ""]) == []


def test_a_folder_of_that_name_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt_of_nobody").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not Library("x", "X", "tensorrt_of_nobody", ahead_of_time=False).installed
