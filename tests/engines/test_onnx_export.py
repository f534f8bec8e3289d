"""Exported graphs against the torch modules that they are of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import cut_out, quantized_layers
from onnx import TensorProto, helper, numpy_helper
from tiny_unets import measured, unet_inputs

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import CacheEntry, EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.deepcache import enter, inside, leave
from catimage_accel.engines.machine import int8_weight_bits
from catimage_accel.engines.onnx_export import MODEL_FILE, export
from catimage_accel.engines.onnx_weights import _tensor, fold_quantized_weights, narrow_weights
from catimage_accel.engines.onnxruntime import OnnxRuntime
from catimage_accel.engines.openvino import OpenVINO
from catimage_accel.quantize.fake import fake_quantized

SIZES = [
    pytest.param(2, 16, 16, 24, id="trained size"),
    pytest.param(1, 8, 20, 24, id="one row, not square"),
    pytest.param(5, 13, 9, 7, id="sides that halving rounds, fewer tokens"),
]


def run(entry: CacheEntry, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The file as it is: onnxruntime with its optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(entry.folder / MODEL_FILE), options)
    names = [one.name for one in session.get_inputs()]
    arrays = dict(zip(names, (value.contiguous().numpy() for value in inputs), strict=True))
    return [torch.from_numpy(result) for result in session.run(None, arrays)]


@pytest.mark.parametrize(("rows", "height", "width", "tokens"), SIZES)
def test_unet(
    tiny_sd_folder: Path, engine_cache: EngineCache, tiny_unet: Any, rows: int, height: int, width: int, tokens: int
) -> None:
    inputs = unet_inputs(rows, height, width, tokens)
    entry = export(Component(tiny_sd_folder, "unet"), engine_cache)
    [noise] = run(entry, *inputs)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)
    assert entry.key.precision == "fp32"
    assert export(Component(tiny_sd_folder, "unet"), engine_cache).created == entry.created, "exported once"


@pytest.mark.parametrize(("rows", "height", "width", "tokens"), SIZES)
def test_parts_of_deepcache(
    tiny_sd_folder: Path, engine_cache: EngineCache, tiny_unet: Any, rows: int, height: int, width: int, tokens: int
) -> None:
    inputs = unet_inputs(rows, height, width, tokens)
    outer = enter(tiny_unet, *inputs, None)
    expected = inside(tiny_unet, outer)
    noise, features = run(export(Component(tiny_sd_folder, "unet-deep"), engine_cache), *inputs)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)
    other = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    [noise] = run(export(Component(tiny_sd_folder, "unet-shallow"), engine_cache), *inputs, other)
    torch.testing.assert_close(noise, leave(tiny_unet, outer, other), atol=1e-5, rtol=1e-4)


def test_decoder(tiny_sd_folder: Path, engine_cache: EngineCache) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae").eval()
    entry = export(Component(tiny_sd_folder, "vae_decoder"), engine_cache)
    for rows, height, width in ((2, 16, 16), (3, 9, 12)):
        latents = unet_inputs(rows, height, width)[0]
        with torch.no_grad():
            expected = vae.decode(latents).sample
        torch.testing.assert_close(run(entry, latents)[0], expected, atol=1e-5, rtol=1e-4)


def sdxl_shaped() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8, transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    ).eval()  # fmt: skip


def test_added_conditions_of_sdxl(tmp_path: Path) -> None:
    unet = sdxl_shaped()
    unet.save_pretrained(tmp_path / "unet")
    sample, timestep, text = unet_inputs(3, 8, 10, 5)
    embeds = torch.randn((3, 12), generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1024.0, 768, 0, 0, 1024, 768], [512, 512, 8, 0, 512, 512], [64, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        added = {"text_embeds": embeds, "time_ids": ids}
        expected = unet(sample, timestep, text, added_cond_kwargs=added).sample
    cache = EngineCache(tmp_path / "cache")
    entry = export(Component(tmp_path, "unet"), cache)
    [noise] = run(entry, sample, timestep, text, embeds, ids)
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)
    noise, features = run(export(Component(tmp_path, "unet-deep"), cache), sample, timestep, text, embeds, ids)
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)
    shallow = export(Component(tmp_path, "unet-shallow"), cache)
    [noise] = run(shallow, sample, timestep, text, features, embeds, ids)
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_graphs_are_typed(
    tiny_sd_folder: Path, engine_cache: EngineCache, tiny_unet: Any, precision: str
) -> None:
    """Weights and ports have the type; the means of GroupNorm are float32."""
    entry = export(Component(tiny_sd_folder, "unet", precision=precision), engine_cache)
    model = onnx.shape_inference.infer_shapes(onnx.load(str(entry.folder / MODEL_FILE)), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    wanted = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    assert types == {
        "sample": wanted, "timestep": TensorProto.FLOAT, "encoder_hidden_states": wanted, "noise": wanted
    }  # fmt: skip
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds = {
        node.op_type: {types[name] for name in node.output} for node in model.graph.node if node.output[0] in types
    }
    assert kinds["Conv"] == kinds["MatMul"] == kinds["Gemm"] == {wanted}
    assert kinds["InstanceNormalization"] == {TensorProto.FLOAT}
    if precision == "fp16":  # onnxruntime has it on a CPU, by casts
        inputs = unet_inputs(2)
        [noise] = run(entry, inputs[0].half(), inputs[1], inputs[2].half())
        assert relative(noise.float(), tiny_unet(*inputs).sample) < 5e-3


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def int8(tiny_sd_folder: Path, tiny_int8: Path) -> Component:
    return Component(tiny_sd_folder, "unet", precision="int8", quantization=tiny_int8)


def test_quantized_weights_are_8_bit_initializers(
    tiny_sd_folder: Path, tiny_fp8: Path, engine_cache: EngineCache, int8: Component
) -> None:
    fp8 = Component(tiny_sd_folder, "unet", precision="fp8", quantization=tiny_fp8)
    for component, wanted in ((int8, TensorProto.INT8), (fp8, TensorProto.FLOAT8E4M3FN)):
        entry = export(component, engine_cache)
        model = onnx.load(str(entry.folder / MODEL_FILE))
        codes = [tensor for tensor in model.graph.initializer if tensor.data_type == wanted]
        assert component.scales is not None
        assert len(codes) == len(component.scales.layers)
        weights = sum(int(np.prod(tensor.dims)) for tensor in codes)
        rest = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_type != wanted)
        assert sum(len(tensor.raw_data) for tensor in codes) == weights, "a byte each"
        whole = sum(4 * int(np.prod(tensor.dims)) for tensor in onnx.load(
            str(export(Component(tiny_sd_folder, "unet"), engine_cache).folder / MODEL_FILE)
        ).graph.initializer)  # fmt: skip
        assert 4 * weights + rest <= whole, "no weight is kept twice"


@pytest.mark.parametrize("high_precision", ["fp16", "bf16"])
def test_quantized_graphs_with_16_bit_layers_between(
    tiny_sd_folder: Path, tiny_unet: Any, engine_cache: EngineCache, int8: Component, high_precision: str
) -> None:
    entry = export(int8, engine_cache, high_precision=high_precision)
    model = onnx.shape_inference.infer_shapes(onnx.load(str(entry.folder / MODEL_FILE)), strict_mode=True)
    wanted = TensorProto.FLOAT16 if high_precision == "fp16" else TensorProto.BFLOAT16
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for kind in ("DequantizeLinear", "Conv", "MatMul", "Gemm"):
        found = {types.get(node.output[0]) for node in model.graph.node if node.op_type == kind}
        assert found - {None} == {wanted}, kind
    assert entry.folder != export(int8, engine_cache).folder
    if high_precision == "fp16":
        inputs = unet_inputs(8)
        assert int8.scales is not None
        with torch.no_grad():
            plain = tiny_unet(*inputs).sample
            rounded = relative(fake_quantized(tiny_unet, int8.scales)(*inputs).sample, plain)
        [noise] = run(entry, inputs[0].half(), inputs[1], inputs[2].half())
        assert relative(noise.float(), plain) < 1.2 * rounded


@pytest.mark.parametrize("high_precision", ["fp32", "fp16", "bf16"])
def test_weak_channels_keep_their_weights(tiny_sd_folder: Path, tmp_path: Path, high_precision: str) -> None:
    """Their step is below what float16 holds with full precision, so that the graph's own is wider."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)
    layer = unet.down_blocks[1].resnets[0].conv1
    layer.weight[3] *= 1e-3
    unet.save_pretrained(folder / "unet")
    measured(folder, unet, unet_inputs(4)).save(tmp_path / "int8")
    component = Component(folder, "unet", precision="int8", quantization=tmp_path / "int8")
    entry = export(component, EngineCache(tmp_path / "cache"), high_precision=high_precision)
    model = onnx.load(str(entry.folder / MODEL_FILE))
    tensors = {one.name: one for one in model.graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    [node] = [
        node for node in model.graph.node
        if node.op_type == "DequantizeLinear" and "down_blocks.1/resnets.0/conv1" in node.name
        and node.input[0] in tensors and len(tensors[node.input[0]].dims) == 4
    ]  # fmt: skip
    codes, steps = (_tensor(tensors[name]).float() for name in node.input[:2])
    error = (codes * steps.view(-1, 1, 1, 1) - layer.weight).abs().amax((1, 2, 3))
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[high_precision]
    rounded = 2 * torch.finfo(kind).eps * layer.weight.abs().amax((1, 2, 3))  # the weight itself, and its scale
    assert bool((error <= 0.5 * steps + rounded).all())


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_every_quantized_layer_rounds_as_torch(
    tiny_unet: Any, engine_cache: EngineCache, int8: Component, library: str
) -> None:
    """Layer by layer, fed the same: equal to 1e-5, but for results on the edge between two steps, one step apart.

    With as many bits of weights as the libraries add up rightly on this processor; torch's have as many.
    End to end such edges cascade, which says nothing of the layers.
    """
    assert int8.scales is not None
    unet = fake_quantized(tiny_unet, int8.scales)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in quantized_layers(unet).items():
        module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        if int8_weight_bits() == 7:
            steps = (int8.scales.layers[name].weight_amax / 127).view(-1, *(1,) * (module.weight.ndim - 1))
            module.weight.data = 2 * steps * ((module.weight / steps).round() / 2).round()
    with torch.no_grad():
        unet(*unet_inputs(3))
    model = onnx.load(str(export(int8, engine_cache, weight_bits=int8_weight_bits()).folder / MODEL_FILE))
    values = edges = 0
    for name, layer in cut_out(model, unet):
        input, expected = seen[name]
        actual = torch.from_numpy(run_layer(layer, input.contiguous().numpy(), library))
        error = (actual - expected).abs()
        off = error > 1e-5 * expected.abs().max()
        amax = int8.scales.layers[name].output_amax
        if amax is None:
            # One step of one input, times the largest weight, is the most that an edge in the input can do.
            scales = int8.scales.layers[name]
            # With 7 bits that is 128/127 of it.
            assert error.max() <= 1.01 * scales.input_amax / 127 * scales.weight_amax.max(), name
        else:
            assert error.max() <= 1.001 * amax / 127, name
        assert off.float().mean() < 0.01, name
        values, edges = values + off.numel(), edges + int(off.sum())
    assert len(seen) == len(int8.scales.layers)
    assert edges < 2e-3 * values


@pytest.mark.parametrize(("name", "runtime"), [("onnxruntime", OnnxRuntime), ("openvino", OpenVINO)])
@pytest.mark.parametrize("bits", [7, 8])
def test_processors_engines_hold_the_bits_that_they_add_up(
    name: str, runtime: Any, bits: int, int8: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was built for one kind of processor is never run on the other."""
    monkeypatch.setattr(f"catimage_accel.engines.{name}.int8_weight_bits", lambda: bits)
    cache = EngineCache(tmp_path)
    runtime().runner(int8, ShapeProfile((2,), 16, 16, 24, 32), cache, torch.device("cpu")).build()
    [exported] = [entry for entry in cache.entries() if (entry.folder / MODEL_FILE).is_file()]
    model = onnx.load(str(exported.folder / MODEL_FILE))
    codes = [numpy_helper.to_array(one) for one in model.graph.initializer if one.data_type == TensorProto.INT8]
    largest = max(int(np.abs(one.astype(int)).max()) for one in codes if one.size > 1)
    assert largest == {7: 64, 8: 127}[bits]
    told = [dict(entry.key.options).get("weight_bits") for entry in cache.entries() if entry.key.profile == "dynamic"]
    assert set(told) == {7: {"7"}, 8: {None}}[bits]


@pytest.mark.parametrize("bits", [0, 6, 16])
def test_other_numbers_of_bits_are_refused(bits: int, int8: Component, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"weight_bits is {bits}; accepted: 7 or 8"):
        export(int8, EngineCache(tmp_path), weight_bits=bits)


def run_layer(layer: onnx.ModelProto, input: np.ndarray, library: str) -> np.ndarray:
    if library == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(layer.SerializeToString(), options)
        return np.asarray(session.run(None, {layer.graph.input[0].name: input})[0])
    import openvino

    core = openvino.Core()
    model = core.read_model(layer.SerializeToString())
    model.reshape(input.shape)
    return np.asarray(core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})(input)[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), axis=st.sampled_from([0, 1]), per_channel=st.booleans(), size=st.floats(1e-6, 1e6))
def test_folding_changes_no_bit(seed: int, axis: int, per_channel: bool, size: float) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((5, 7)) * size).astype(np.float32)
    count = (weight.shape[axis],) if per_channel else ()
    step = (np.abs(weight).max() / random.uniform(20, 200, count)).astype(np.float32)
    scale = numpy_helper.from_array(np.asarray(step), "scale")
    zero = numpy_helper.from_array(np.zeros(count, np.int8), "zero")
    nodes = [
        helper.make_node("QuantizeLinear", ["weight", "scale", "zero"], ["codes"], axis=axis),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"], axis=axis),
        helper.make_node("Add", ["rounded", "x"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 7])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 7])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "weight"), scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def compute() -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        return np.asarray(session.run(None, {"x": np.zeros((5, 7), np.float32)})[0])

    before = compute()
    assert fold_quantized_weights(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "Add"]
    assert "weight" not in {tensor.name for tensor in model.graph.initializer}
    np.testing.assert_array_equal(compute(), before)
    [codes] = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "codes"]
    assert narrow_weights(model) == 1
    onnx.checker.check_model(model, full_check=True)
    [halves] = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "codes"]
    assert np.abs(halves.astype(int)).max() <= 64
    assert np.abs(2 * halves.astype(int) - codes).max() <= 1
    shape = [1, 1]
    shape[axis] = -1
    assert (np.abs(compute() - before) <= 1.001 * step.reshape(shape if per_channel else ())).all()


def test_large_models_keep_their_weights_beside(tiny_sd_folder: Path, tiny_unet: Any, tmp_path: Path) -> None:
    entry = export(Component(tiny_sd_folder, "unet"), EngineCache(tmp_path), external_over=100_000)
    weights = sum(parameter.nbytes for parameter in tiny_unet.parameters())
    assert (entry.folder / f"{MODEL_FILE}.data").stat().st_size > 0.8 * weights
    inputs = unet_inputs(2)
    torch.testing.assert_close(run(entry, *inputs)[0], tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)


def bessel(monkeypatch: pytest.MonkeyPatch, unet: UNet2DConditionModel) -> None:
    def process(self: Any, encoder_hidden_states: torch.Tensor, added_cond_kwargs: Any) -> torch.Tensor:
        return torch.special.bessel_j0(encoder_hidden_states)

    monkeypatch.setattr(UNet2DConditionModel, "process_encoder_hidden_states", process)


def labels(monkeypatch: pytest.MonkeyPatch, unet: UNet2DConditionModel) -> None:
    unet.register_to_config(num_class_embeds=3)


def without_onnx(monkeypatch: pytest.MonkeyPatch, unet: UNet2DConditionModel) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(bessel, r"unet \(unet\): .*aten::special_bessel_j0", id="an operator that ONNX has not"),
        pytest.param(labels, "'class labels'; accepted: none or 'text_time'", id="class labels"),
        pytest.param(without_onnx, r"onnx not installed: pip install 'catimage-accel\[onnx\]'", id="no onnx"),
    ],
)
def test_what_cannot_be_exported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    damage: Callable[[pytest.MonkeyPatch, UNet2DConditionModel], None], message: str,
) -> None:  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",), cross_attention_dim=8, norm_num_groups=4, mid_block_type=None,
        attention_head_dim=2,
    )  # fmt: skip
    damage(monkeypatch, unet)
    unet.save_pretrained(tmp_path / "unet")
    cache = EngineCache(tmp_path / "cache")
    with pytest.raises(EngineUnavailable, match=message) as caught:
        export(Component(tmp_path, "unet"), cache)
    assert "\n" not in str(caught.value)
    assert "graph(" not in "".join(capfd.readouterr())
    assert cache.entries() == []


def test_scales_of_other_weights_are_refused(tiny_sd_folder: Path, tiny_int8: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_sd_folder, tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.conv_out.bias.data += 1
    unet.save_pretrained(folder / "unet")
    cache = EngineCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="the quantization was made from"):
        export(Component(folder, "unet", precision="int8", quantization=tiny_int8), cache)
    with pytest.raises(ValueError, match=r"precision is 'fp8', but .* holds 'int8' scales"):
        export(Component(tiny_sd_folder, "unet", precision="fp8", quantization=tiny_int8), cache)
