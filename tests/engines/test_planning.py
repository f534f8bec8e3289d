"""What is built ahead is what an engine asks for when it draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.graph import GraphEngine
from catimage_accel.engines.planning import components_of, shape_profile, target_device
from catimage_accel.engines.registry import find_runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("deepcache", [False, True], ids=["whole UNet", "DeepCache"])
def test_what_is_planned_is_what_is_used(tiny_sd_folder: Path, tmp_path: Path, deepcache: bool) -> None:
    runtime, cache = find_runtime("onnxruntime"), EngineCache(tmp_path)
    if (reason := runtime.why_not(CPU)) is not None:
        pytest.skip(reason)
    profile = shape_profile(tiny_sd_folder, "unet", runtime.rows)
    components = components_of(tiny_sd_folder, "unet", "fp32", None, CPU, deepcache=deepcache)
    planned = [
        entry.key.digest for component in components for entry in runtime.runner(component, profile, cache, CPU).build()
    ]
    engine = GraphEngine(runtime, tiny_sd_folder, cache=cache)
    assert engine.profile == profile
    assert [entry.key.digest for entry in engine.build(deepcache=deepcache)] == planned


@pytest.mark.parametrize(
    ("precision", "target", "upcast", "decoder"),
    [
        ("fp32", CPU, True, "fp32"),
        ("bf16", CPU, True, "bf16"),
        ("fp16", CUDA, False, "fp16"),
        ("fp16", CUDA, True, "fp32"),
        ("int8", CPU, False, "fp32"),
        ("int8", CUDA, False, "fp16"),
        ("fp8", CUDA, True, "fp32"),
    ],
)
def test_decoders_are_never_quantized_nor_made_to_overflow(
    tiny_sd_folder: Path, tmp_path: Path, precision: str, target: torch.device, upcast: bool, decoder: str
) -> None:
    shutil.copytree(tiny_sd_folder, tmp_path / "model")
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": upcast}))
    *_, last = components_of(tmp_path / "model", "unet", precision, None, target, deepcache=False)
    assert (last.name, last.precision, last.quantization) == ("vae_decoder", decoder, None)


@pytest.mark.parametrize(
    ("engine", "device", "target"),
    [("tensorrt-rtx", CPU, "cuda"), ("tensorrt", CUDA, "cuda"), ("openvino", CPU, "cpu")],
)
def test_tensorrt_builds_for_cuda_wherever_it_is(engine: str, device: torch.device, target: str) -> None:
    assert target_device(engine, device).type == target


def test_a_folder_that_can_not_be_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        components_of(tmp_path / "nothing", "unet", "fp32", None, CPU, deepcache=False)
