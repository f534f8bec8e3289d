"""TensorRT: what is built, with TensorRT-RTX, which builds without a CUDA device; and, on one, what is run."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.tensorrt import RUNTIMES
from catimage_accel.engines.tensorrt.api import TENSORRT, TENSORRT_RTX
from catimage_accel.engines.tensorrt.builder import build_engine
from catimage_accel.engines.tensorrt.layers import Layer, LayerTable, layers_of_inspector, layers_of_log
from catimage_accel.engines.tensorrt.runner import ENGINE_FILE, TensorRTRunner
from catimage_accel.quantize import LayerQuantization, Quantization, weights_sha256

CPU = torch.device("cpu")
TINY = ShapeProfile((2,), height=16, width=16, tokens=24, text_features=32)

needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def quantization(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales for all convolutions and linear layers of the tiny UNet."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    layers = {
        name: LayerQuantization(module.weight.detach().flatten(1).abs().amax(1).clamp(min=1e-6), torch.tensor(4.0))
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    folder = tmp_path_factory.mktemp("quantization")
    Quantization("int8", "int8", layers, {}, weights_sha256(tiny_sd_folder)).save(folder)
    return folder


def rtx(component: Component, cache: EngineCache, profile: ShapeProfile = TINY) -> TensorRTRunner:
    return RUNTIMES["tensorrt-rtx"].runner(component, profile, cache, CPU)


@pytest.fixture(scope="module")
def tables(tiny_sd_folder: Path, quantization: Path, cache: EngineCache) -> dict[str, LayerTable]:
    """What the builder told of the tiny UNet, by precision."""
    found = {}
    for precision in ("fp32", "int8"):
        component = Component(tiny_sd_folder, "unet", "unet", precision, quantization if precision == "int8" else None)
        [entry] = rtx(component, cache).build()
        table = LayerTable.load(entry.folder)
        assert table is not None
        found[precision] = table
    return found


@needs_rtx
def test_quantized_weights_go_in_as_int8(tables: dict[str, LayerTable], quantization: Path) -> None:
    quantized = tables["int8"]
    weights = {
        name: layer.weight_amax for name, layer in Quantization.load(quantization).layers.items()
    }  # fmt: skip
    assert len(quantized.quantized_weights) == len(weights)
    assert len(quantized.multiplying("INT8")) == len(quantized.multiplying()) > 30
    kinds = {layer.kind for layer in quantized.multiplying("INT8")}
    assert {"correlation", "gemm"} <= kinds, "convolutions and matrix multiplications"


@needs_rtx
def test_an_engine_that_is_not_quantized_has_nothing_in_int8(tables: dict[str, LayerTable]) -> None:
    plain = tables["fp32"]
    assert plain.quantized_weights == {}
    assert {layer.precision for layer in plain.multiplying()} == {"FP32"}
    assert not any("INT8" in (*layer.inputs, *layer.outputs, layer.weights) for layer in plain.layers)


@needs_rtx
def test_an_engine_is_built_once(tiny_sd_folder: Path, cache: EngineCache, tables: dict[str, LayerTable]) -> None:
    told: list[tuple[str, float]] = []
    [entry] = rtx(Component(tiny_sd_folder, "unet"), cache).build(progress=lambda *step: told.append(step))
    assert told == []
    assert entry.key.profile == "rows=2,height=16,width=16,tokens=24"
    assert (entry.key.runtime, entry.key.device) == ("tensorrt-rtx", "sm_80 and later")
    assert (entry.folder / ENGINE_FILE).stat().st_size > 10**6


@needs_rtx
def test_other_weights_are_another_engine(tiny_sd_folder: Path, cache: EngineCache, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.01)
    unet.save_pretrained(tmp_path / "unet")
    shutil.copytree(tiny_sd_folder / "vae", tmp_path / "vae")
    components = [Component(model, "unet") for model in (tiny_sd_folder, tmp_path)]
    one, other = (rtx(component, cache).key for component in components)
    assert one.digest != other.digest


@needs_rtx
def test_progress_grows_to_the_end(onnx_file: Callable[..., Path]) -> None:
    told: list[tuple[str, float]] = []
    build_engine(
        TENSORRT_RTX, onnx_file("Relu"), TINY, device=CPU, advance=lambda phase, share: told.append((phase, share))
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert all(phase for phase, _ in told)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with one operator between "sample" and "noise"."""
    onnx = pytest.importorskip("onnx")

    def write(operator: str, channels: int | None = 4, name: str = "the_node") -> Path:
        kind = onnx.TensorProto.FLOAT
        shape = ["rows", channels, "height", "width"]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["sample"], ["noise"], name=name)], "one",
            [onnx.helper.make_tensor_value_info("sample", kind, shape)],
            [onnx.helper.make_tensor_value_info("noise", kind, shape)],
        )  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(model, str(tmp_path / "model.onnx"))
        return tmp_path / "model.onnx"

    return write


@needs_rtx
@pytest.mark.parametrize("operator", ["StringConcat", "NoSuchOperator"], ids=["one of ONNX", "one of nobody"])
def test_an_operator_that_is_not_supported_is_named(onnx_file: Callable[..., Path], operator: str) -> None:
    with pytest.raises(
        EngineUnavailable, match=rf"^TensorRT-RTX [\d.]+ can't read model\.onnx: node the_node \({operator}"
    ) as e:
        build_engine(TENSORRT_RTX, onnx_file(operator), TINY, device=CPU)
    assert "\n" not in str(e.value)


@needs_rtx
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "can't read model.onnx"), (b"not an ONNX file", "can't read model.onnx")],
    ids=["empty", "something else"],
)
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EngineUnavailable, match=message):
        build_engine(TENSORRT_RTX, tmp_path / "model.onnx", TINY, device=CPU)


@needs_rtx
def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is missing"):
        build_engine(TENSORRT_RTX, tmp_path / "model.onnx", TINY, device=CPU)


@needs_rtx
def test_inputs_that_the_profile_can_not_fix(onnx_file: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"sample is \(-1, -1, -1, -1\) in the file; accepted: -1 for rows, height"):
        build_engine(TENSORRT_RTX, onnx_file("Relu", channels=None), TINY, device=CPU)


@needs_rtx
def test_an_interrupted_build_stops(onnx_file: Callable[..., Path]) -> None:
    def interrupt(phase: str, share: float) -> None:
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(TENSORRT_RTX, onnx_file("Relu"), TINY, device=CPU, advance=interrupt)


@needs_rtx
def test_what_is_built_without_a_device_does_not_run_without_one(
    tiny_sd_folder: Path, cache: EngineCache, tables: dict[str, LayerTable]
) -> None:
    inputs = {
        "sample": torch.zeros(1, 4, 16, 16), "timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 24, 32)
    }  # fmt: skip
    with pytest.raises(EngineUnavailable, match="the device is cpu; accepted: a CUDA device"):
        rtx(Component(tiny_sd_folder, "unet"), cache)(inputs)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_library_is_told_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, cache: EngineCache
) -> None:
    monkeypatch.setattr("catimage_accel.engines.tensorrt.api.find_spec", lambda package: None)
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

    monkeypatch.setattr("catimage_accel.engines.tensorrt.api.find_spec", lambda package: object())
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
    monkeypatch.setattr("catimage_accel.engines.tensorrt.api.find_spec", lambda package: object())
    monkeypatch.setattr(importlib, "import_module", lambda package: module)
    builder = SimpleNamespace(create_network=lambda flags: flags)
    assert TENSORRT.create_network(builder) == (2 if flagged else 0)


@pytest.mark.parametrize("name", RUNTIMES)
def test_no_device_is_told_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catimage_accel.engines.tensorrt.api.find_spec", lambda package: object())
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
