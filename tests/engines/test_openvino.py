"""OpenVINO's runner: a compiled model a batch size, kept in the cache, and one for everything else."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_unets import unet_inputs

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.openvino import OpenVINO, OpenVINORunner

NAMES = ("sample", "timestep", "encoder_hidden_states")
PROFILE = ShapeProfile((2, 4), 16, 16, 24, 32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("openvino"))


def runner(folder: Path, cache: EngineCache, **values: Any) -> OpenVINORunner:
    return OpenVINO().runner(Component(folder, "unet", **values), PROFILE, cache, torch.device("cpu"))


def run(one: OpenVINORunner, *inputs: torch.Tensor) -> torch.Tensor:
    return one(dict(zip(NAMES, inputs, strict=True)))["noise"]


def shapes(one: OpenVINORunner) -> dict[int | None, list[int]]:
    """Batch size -> the rows that its compiled model takes, -1 for any."""
    found = {}
    for rows, request in one._requests.items():
        size = request.get_compiled_model().input("sample").partial_shape[0]
        found[rows] = size.get_length() if size.is_static else -1
    return found


@pytest.mark.parametrize(
    ("rows", "size", "tokens", "bucket"),
    [
        pytest.param(1, (16, 16), 24, {2: 2}, id="filled up"),
        pytest.param(4, (16, 16), 24, {4: 4}, id="a batch size"),
        pytest.param(5, (16, 16), 24, {None: -1}, id="more rows than any"),
        pytest.param(2, (13, 9), 24, {None: -1}, id="another size"),
        pytest.param(2, (16, 16), 5, {None: -1}, id="fewer tokens"),
    ],
)
def test_runs_in_the_model_of_its_batch_size(
    tiny_sd_folder: Path, tiny_unet: Any, cache: EngineCache, rows: int, size: tuple[int, int], tokens: int, bucket: Any
) -> None:
    one, inputs = runner(tiny_sd_folder, cache), unet_inputs(rows, *size, tokens)
    noise = run(one, *inputs)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)
    assert shapes(one) == bucket
    again = noise.clone()
    run(one, -inputs[0], *inputs[1:])
    torch.testing.assert_close(noise, again, atol=0, rtol=0, msg="a later call wrote into an earlier one's output")


def test_inputs_of_other_types_and_layouts(tiny_sd_folder: Path, tiny_unet: Any, cache: EngineCache) -> None:
    sample, timestep, text = unet_inputs(2)
    sample, text = sample.to(torch.bfloat16), text.to(torch.bfloat16)
    strided = sample.to(memory_format=torch.channels_last)
    noise = run(runner(tiny_sd_folder, cache), strided, timestep.double(), text.repeat(1, 2, 1)[:, :24])
    expected = tiny_unet(sample.float(), timestep, text.float()).sample
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)


def test_compiled_once_for_all_processes(
    tiny_sd_folder: Path, tiny_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, told = EngineCache(tmp_path), []
    entries = runner(tiny_sd_folder, cache).build(told.append)
    assert told == ["unet, 2 rows", "unet, 4 rows"]
    assert [entry.key.profile.split(",")[0] for entry in entries] == ["rows=2", "rows=4"]
    weights = sum(parameter.nbytes for parameter in tiny_unet.parameters())
    sizes = {entry.key.profile: entry.bytes for entry in cache.entries() if entry.key.runtime == "openvino"}
    assert len(sizes) == 3
    assert sizes["dynamic"] > weights, "the weights, once"

    def compile_again(*_: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(OpenVINORunner, "_compile", compile_again)
    monkeypatch.setattr("catimage_accel.engines.openvino.export", compile_again)
    inputs = unet_inputs(4)
    noise = run(runner(tiny_sd_folder, EngineCache(tmp_path)), *inputs)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)


def test_a_model_that_cannot_be_imported_is_compiled(
    tiny_sd_folder: Path, tiny_unet: Any, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        def __init__(self, core: Any) -> None:
            self.read_model, self.compile_model = core.read_model, core.compile_model

        def import_model(self, *_: Any) -> Any:
            raise RuntimeError("made for another processor")

    from catimage_accel.engines import openvino

    core = Core(openvino._core())
    monkeypatch.setattr(openvino, "_core", lambda: core)
    inputs = unet_inputs(2)
    noise = run(runner(tiny_sd_folder, cache), *inputs)
    torch.testing.assert_close(noise, tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)


def test_runs_with_torchs_threads(tiny_sd_folder: Path, cache: EngineCache) -> None:
    """Imported with another number of threads than it was compiled with."""
    runner(tiny_sd_folder, cache).build()
    torch.set_num_threads(2)
    try:
        one = runner(tiny_sd_folder, cache)
        run(one, *unet_inputs(2))
        fresh = one._compile(2)
    finally:
        torch.set_num_threads(1)
    threads = [model.get_property("INFERENCE_NUM_THREADS") for model in (one._requests[2].get_compiled_model(), fresh)]
    assert threads == [min(2, len(os.sched_getaffinity(0)))] * 2


def test_bf16_is_as_exact_as_torchs(tiny_sd_folder: Path, tiny_unet: Any, cache: EngineCache) -> None:
    """At late timesteps too, which bfloat16 does not hold: 997.3 would be 996."""
    try:
        one = runner(tiny_sd_folder, cache, precision="bf16")
    except EngineUnavailable as error:
        pytest.skip(str(error))
    half = copy.deepcopy(tiny_unet).to(torch.bfloat16)
    _, _, text = unet_inputs(4)
    timestep = torch.tensor([997.3, 993.1, 601.7, 1.0])
    for size in ((16, 16), (13, 9)):
        sample = unet_inputs(4, *size)[0]
        expected = tiny_unet(sample, timestep, text).sample
        theirs = half(sample.bfloat16(), timestep, text.bfloat16()).sample.float()
        ours = run(one, sample, timestep, text)
        errors = [(noise - expected).flatten(1).norm(dim=1) for noise in (ours, theirs)]
        assert bool((errors[0] < 1.25 * errors[1]).all())
        assert bool((errors[0] > 0).all())
    kept = [entry.key for entry in cache.entries() if entry.key.profile == "dynamic"]
    assert {key.precision for key in kept} == {"fp32"}, "from float32's weights"


def test_a_runtime_for_cpus_only() -> None:
    assert "the device is cuda:0" in str(OpenVINO().why_not(torch.device("cuda:0")))
    assert OpenVINO().why_not(torch.device("cpu")) is None
    assert OpenVINO().version()[0].isdigit()


def test_another_batch_size_after_the_cache_was_pruned(tiny_sd_folder: Path, tiny_unet: Any, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    one = runner(tiny_sd_folder, cache)
    run(one, *unet_inputs(2))
    assert cache.prune(0)
    for inputs in (unet_inputs(4), unet_inputs(5)):
        torch.testing.assert_close(run(one, *inputs), tiny_unet(*inputs).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("error", [FileNotFoundError("no record.json"), ValueError("record.json is no JSON")], ids=repr)
def test_a_record_that_goes_while_it_is_read_is_told_as_what_eager_can_replace(
    tiny_sd_folder: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def gone(_: Path) -> Any:
        raise error

    monkeypatch.setattr("catimage_accel.engines.openvino.read_record", gone)
    with pytest.raises(EngineUnavailable, match=f"openvino can't run the unet: {error}; use engine 'onnxruntime'"):
        run(runner(tiny_sd_folder, cache), *unet_inputs(2))


def test_bf16_holds_sdxls_sizes_as_torchs_does(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """The sines of sizes of a thousand and more, taken in bfloat16, would be those of other sizes."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl_folder, folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_config(
        {**config, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 20 + 6 * 256}
    ).eval()  # as many features a size as SDXL has
    with torch.no_grad():
        for layer in (unet.add_embedding.linear_1, unet.add_embedding.linear_2):
            layer.weight *= 3  # so that the sizes matter
    unet.save_pretrained(folder / "unet")
    try:
        one = OpenVINO().runner(
            Component(folder, "unet", precision="bf16"), ShapeProfile((2,), 16, 16, 24, 80),
            EngineCache(tmp_path / "cache"), torch.device("cpu"),
        )  # fmt: skip
    except EngineUnavailable as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 24, 80)))
    timestep, pooled = torch.tensor([997.3, 1.0]), torch.randn(2, 20, generator=generator)
    half = copy.deepcopy(unet).to(torch.bfloat16)
    for size in ((1024, 1024), (768, 1344)):
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]] * 2, dtype=torch.float32)}
        given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": text, **added}
        with torch.no_grad():
            expected = unet(sample, timestep, text, added_cond_kwargs=added).sample
            halved = {"text_embeds": pooled.bfloat16(), "time_ids": added["time_ids"]}
            theirs = half(sample.bfloat16(), timestep, text.bfloat16(), added_cond_kwargs=halved).sample.float()
        ours = one(given)["noise"]
        assert 0 < (ours - expected).norm() < 1.25 * (theirs - expected).norm()
