"""ONNX Runtime's runner: one session for all shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_unets import unet_inputs

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.onnx_export import MODEL_FILE
from catimage_accel.engines.onnxruntime import OnnxRuntime, OnnxRuntimeRunner

NAMES = ("sample", "timestep", "encoder_hidden_states")
PROFILE = ShapeProfile((4,), 16, 16, 24, 32)


def runner(component: Component, cache: EngineCache) -> OnnxRuntimeRunner:
    return OnnxRuntime().runner(component, PROFILE, cache, torch.device("cpu"))


def run(one: OnnxRuntimeRunner, *inputs: torch.Tensor) -> torch.Tensor:
    return one(dict(zip(NAMES, inputs, strict=True)))["noise"]


@pytest.mark.parametrize(
    ("rows", "size", "tokens"),
    [(1, (16, 16), 24), (4, (16, 16), 24), (9, (16, 16), 24), (2, (13, 9), 5)],
    ids=["one row", "the profile", "more rows", "another size and fewer tokens"],
)
def test_runs_any_shape(
    tiny_sd_folder: Path, tiny_unet: Any, engine_cache: EngineCache, rows: int, size: tuple[int, int], tokens: int
) -> None:
    one, inputs = runner(Component(tiny_sd_folder, "unet"), engine_cache), unet_inputs(rows, *size, tokens)
    noise = run(one, *inputs)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)
    again = noise.clone()
    run(one, -inputs[0], *inputs[1:])
    torch.testing.assert_close(noise, again, atol=0, rtol=0, msg="a later call wrote into an earlier one's output")


def test_session_has_torchs_threads_and_is_made_once(tiny_sd_folder: Path, engine_cache: EngineCache) -> None:
    torch.set_num_threads(2)
    try:
        one = runner(Component(tiny_sd_folder, "unet"), engine_cache)
        options = one._session.get_session_options()
    finally:
        torch.set_num_threads(1)
    assert options.intra_op_num_threads == 2
    session = one._session
    run(one, *unet_inputs(2))
    assert one._session is session


def test_int8_computes_with_integers(
    tiny_sd_folder: Path, tiny_int8: Path, engine_cache: EngineCache, tmp_path: Path
) -> None:
    """What the session runs after its optimizations, not what the file says."""
    import onnx
    import onnxruntime

    component = Component(tiny_sd_folder, "unet", precision="int8", quantization=tiny_int8)
    [entry] = runner(component, engine_cache).build()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(entry.folder / MODEL_FILE), options)
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert component.scales is not None
    convolutions = sum(scales.output_amax is not None for scales in component.scales.layers.values())
    assert kinds.count("QLinearConv") > 0.7 * convolutions
    assert kinds.count("MatMulIntegerToFloat") > 0


def test_build_tells_what_it_built(tiny_sd_folder: Path, engine_cache: EngineCache) -> None:
    told: list[str] = []
    [entry] = runner(Component(tiny_sd_folder, "vae_decoder"), engine_cache).build(told.append)
    assert told == ["vae_decoder"]
    assert (entry.folder / MODEL_FILE).is_file()


def test_a_file_it_cannot_load(
    tiny_sd_folder: Path, engine_cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    def refuse(*_: Any, **__: Any) -> Any:
        raise onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph("no such operator\nin node 3")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    one = runner(Component(tiny_sd_folder, "unet"), engine_cache)
    with pytest.raises(EngineUnavailable, match=r"can't run the unet: no such operator; use engine 'eager'$"):
        run(one, *unet_inputs(2))


def test_a_runtime_for_cpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the device is cuda:0" in str(OnnxRuntime().why_not(torch.device("cuda:0")))
    assert OnnxRuntime().why_not(torch.device("cpu")) is None
    assert OnnxRuntime().version()[0].isdigit()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert OnnxRuntime().why_not(torch.device("cpu")) == (
        "onnxruntime not installed: pip install 'catimage-accel[cpu]'"
    )
