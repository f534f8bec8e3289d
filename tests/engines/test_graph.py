"""One step of graph engines against the eager engine: rows, sizes, DeepCache."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny_unets import compare, unet_inputs

from catimage_accel.engines import DeepFeatures, Engine
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.graph import GraphEngine
from catimage_accel.engines.registry import LoadedEngines, find_runtime


@pytest.fixture(scope="module")
def engines(engine_cache: EngineCache) -> LoadedEngines:
    return LoadedEngines(torch.device("cpu"), engine_cache)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("rows", "refresh"),
    [
        pytest.param(1, None, id="one row"),
        pytest.param(5, None, id="between two buckets"),
        pytest.param(70, None, id="more than the largest bucket, in pieces"),
        pytest.param(7, (0, 3, 6), id="some at a refresh"),
        pytest.param(4, (), id="none at a refresh"),
    ],
)
def test_rows(
    tiny_sd_folder: Path, engines: LoadedEngines, engine: str, rows: int, refresh: tuple[int, ...] | None
) -> None:
    graph, eager = (engines.get(tiny_sd_folder, engines=(one,), deepcache=True) for one in (engine, "eager"))
    assert isinstance(graph, Engine)
    compare(graph, eager, rows)
    features = None
    if refresh is not None:
        features = torch.randn((rows, 32, 16, 16), generator=torch.Generator().manual_seed(5))
    compare(graph, eager, rows, deep=DeepFeatures(features, refresh))


def test_held_features_need_a_first_step(tiny_sd_folder: Path, engines: LoadedEngines) -> None:
    graph = engines.get(tiny_sd_folder, engines=("onnxruntime",), deepcache=True)
    sample, timestep, _ = unet_inputs(2)
    with pytest.raises(ValueError, match=r"deep\.features is None"):
        graph.denoise(sample, timestep, graph.gather(graph.encode_prompts(["", ""])), deep=DeepFeatures(None, (1,)))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_decodes_as_eager(tiny_sd_folder: Path, engines: LoadedEngines, engine: str) -> None:
    graph, eager = (engines.get(tiny_sd_folder, engines=(one,)) for one in (engine, "eager"))
    for rows, size in ((3, (16, 16)), (1, (9, 12))):
        latents = unet_inputs(rows, *size)[0]
        torch.testing.assert_close(graph.decode(latents), eager.decode(latents), atol=1e-5, rtol=1e-4)


def test_sizes_that_a_runtime_does_not_take_are_drawn_by_eager(
    tiny_sd_folder: Path, engines: LoadedEngines, engine_cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT, which is built for one size."""
    runtime = find_runtime("onnxruntime")
    monkeypatch.setattr(type(runtime), "any_size", False)
    monkeypatch.setattr("catimage_accel.engines.unavailable._told", set())
    graph, eager = GraphEngine(runtime, tiny_sd_folder, cache=engine_cache), engines.get(tiny_sd_folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        compare(graph, eager, 2, (12, 8))
        compare(graph, eager, 3, (12, 8), DeepFeatures())
        torch.testing.assert_close(graph.decode(unet_inputs(1, 12, 8)[0]), eager.decode(unet_inputs(1, 12, 8)[0]))
    [text] = [str(one.message) for one in told if one.category is UserWarning]
    assert text == "onnxruntime was built for latents of 16x16; those of 12x8 are drawn by 'eager'"
