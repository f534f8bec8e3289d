"""TensorRT: what is built, with TensorRT-RTX, which builds without a CUDA device; and, on one, what is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.tensorrt import RUNTIMES
from catimage_accel.engines.tensorrt.api import TENSORRT_RTX
from catimage_accel.engines.tensorrt.builder import build_engine
from catimage_accel.engines.tensorrt.layers import LayerTable
from catimage_accel.engines.tensorrt.runner import ENGINE_FILE, TensorRTRunner
from catimage_accel.quantize import LayerQuantization, Quantization, fake_quantized, weights_sha256

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


@pytest.fixture(params=RUNTIMES)
def on_cuda(request: pytest.FixtureRequest, cache: EngineCache, tiny_sd_folder: Path) -> Callable[..., TensorRTRunner]:
    """Runners on a CUDA device, for each library that is installed and supports it."""
    runtime, device = RUNTIMES[request.param], torch.device("cuda")
    if (reason := runtime.why_not(device)) is not None:
        pytest.skip(reason)
    profile = ShapeProfile((1, 4), height=16, width=16, tokens=24, text_features=32)

    def make(precision: str = "fp32", quantization: Path | None = None) -> TensorRTRunner:
        return runtime.runner(
            Component(tiny_sd_folder, "unet", "unet", precision, quantization), profile, cache, device
        )

    return make


def unet_inputs(rows: int, device: str = "cuda") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "sample": torch.randn((rows, 4, 16, 16), generator=generator).to(device),
        "timestep": torch.linspace(999, 1, rows).to(device),
        "encoder_hidden_states": torch.randn((rows, 24, 32), generator=generator).to(device),
    }


@pytest.fixture(scope="module")
def in_torch(tiny_sd_folder: Path) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The tiny UNet in float32 on the CPU."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")

    @torch.no_grad()
    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return unet(**{name: value.cpu().float() for name, value in inputs.items()}).sample

    return run


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_a_device_computes_what_torch_does(
    on_cuda: Callable[..., TensorRTRunner], in_torch: Callable[..., torch.Tensor], precision: str, tolerance: float
) -> None:
    runner = on_cuda(precision)
    for rows in (1, 2, 4, 3):
        inputs = unet_inputs(rows)
        expected = in_torch(inputs)
        actual = runner(inputs)["noise"].float().cpu()
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.gpu
def test_int8_on_a_device_is_near_what_it_rounds(
    on_cuda: Callable[..., TensorRTRunner], quantization: Path, tiny_sd_folder: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    rounded = fake_quantized(unet, Quantization.load(quantization))
    inputs = unet_inputs(4)
    with torch.no_grad():
        exact, expected = (each(**{k: v.cpu() for k, v in inputs.items()}).sample for each in (unet, rounded))
    actual = on_cuda("int8", quantization)(inputs)["noise"].float().cpu()
    # Ties of rounding cascade, so layers differ by steps; but it errs as the model of it errs, not more.
    assert (actual - exact).square().mean() <= 1.5 * (expected - exact).square().mean()


@pytest.mark.gpu
def test_calls_on_a_device_keep_their_results_apart(
    on_cuda: Callable[..., TensorRTRunner], in_torch: Callable[..., torch.Tensor]
) -> None:
    runner = on_cuda()
    batches = [unet_inputs(rows) for rows in (4, 1, 3, 4, 2)]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for turn, batch in enumerate(batches):
        with torch.cuda.stream(streams[turn % len(streams)]):
            results.append(runner(batch)["noise"])
    torch.cuda.synchronize()
    for batch, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result.cpu(), in_torch(batch), atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_a_device_replays_a_graph(on_cuda: Callable[..., TensorRTRunner]) -> None:
    runner = on_cuda()
    for _ in range(2):
        runner(unet_inputs(4))
    assert runner.graphs == (() if runner.library.ahead_of_time else (4,))


@pytest.mark.gpu
def test_what_is_no_engine_does_not_load(on_cuda: Callable[..., TensorRTRunner], cache: EngineCache) -> None:
    runner = on_cuda()
    [entry] = runner.build()
    cache.discard(entry.key)
    cache.get_or_build(entry.key, lambda folder: (folder / ENGINE_FILE).write_bytes(b"no engine"))  # type: ignore[arg-type, return-value]
    with pytest.warns(UserWarning, match="does not load here and is built again"):
        runner(unet_inputs(1))
