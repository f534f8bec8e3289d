"""catimage engine: what is in the cache, whether it is whole, and making room."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from catimage_accel.cli import app
from catimage_accel.engines.cache import CacheEntry, EngineCache, EngineKey

KEY = EngineKey(
    model_sha256="ab" * 32, component="unet", precision="int8", quantization="cd" * 32,
    profile="rows=8,height=16,width=16,tokens=24", runtime="onnx", runtime_version="1.23.2", device="sm_90",
    os="linux x86_64", options=(("layers", "[bold]"),),
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path / "engines"))
    return EngineCache()


def engine(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["engine", *(str(argument) for argument in arguments)])


def written(name: str, content: bytes) -> Any:
    def build(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return build


def quantized_graph(folder: Path) -> None:
    """x (batch, 4, any) -> quantized twice, a branch in between -> y; its weight in a file of its own."""
    branch = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"])], "branch", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
        helper.make_node("If", ["always"], ["c"], then_branch=branch, else_branch=branch),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"]),
        helper.make_node("Add", ["c", "w"], ["y"]),
    ]
    weights = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        helper.make_tensor("always", TensorProto.BOOL, [], [True]),
        helper.make_tensor("weight", TensorProto.INT8, [2000], bytes(2000), raw=True),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 4, 2000])], weights,
    )  # fmt: skip
    model = helper.make_model(graph)
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")


def two_entries(cache: EngineCache) -> tuple[CacheEntry, CacheEntry]:
    """The older one has 2.5 MB."""
    key = replace(KEY, runtime="tensorrt", runtime_version="11.4")
    old = cache.get_or_build(key, written("unet.engine", bytes(2500000)))
    os.utime(old.folder / "entry.json", (0, old.last_used.timestamp() - 3 * 86400))
    return old, cache.get_or_build(KEY, quantized_graph)


def test_list_shows_what_is_there_last_used_first(cache: EngineCache) -> None:
    old, new = two_entries(cache)
    done = engine("list")
    assert done.exit_code == 0, done.output
    assert f"{cache.folder}: 2 engines, 2.5 MB of 20 GB" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "unet" in line]
    assert [line.split()[1] for line in lines] == [new.key.digest[:12], old.key.digest[:12]]
    for part in ("int8", "tensorrt 11.4", "8 rows of 16x16, 24 tokens", "2.5 MB", "3 d ago"):
        assert part in lines[1]


def test_list_as_json_has_all_fields(cache: EngineCache) -> None:
    old, new = two_entries(cache)
    rows = [json.loads(line) for line in engine("list", "--json").stdout.splitlines()]
    assert [row["digest"] for row in rows] == [new.key.digest, old.key.digest]
    assert rows[1] | {"age_seconds": 0} == {
        "digest": old.key.digest, "component": "unet", "precision": "int8", "runtime": "tensorrt",
        "runtime_version": "11.4", "profile": KEY.profile, "device": "sm_90", "os": "linux x86_64",
        "options": {"layers": "[bold]"}, "quantization": "cd" * 32, "model_sha256": "ab" * 32, "bytes": 2500000,
        "build_seconds": old.build_seconds, "created": old.created.isoformat(), "age_seconds": 0,
        "last_used": cache.entries()[1].last_used.isoformat(),
    }  # fmt: skip
    assert 0 <= rows[1]["age_seconds"] < 60


def test_an_empty_cache_is_listed_and_verified(cache: EngineCache) -> None:
    assert "0 engines" in engine("list").stdout
    assert engine("list", "--json").stdout == ""
    assert engine("verify").exit_code == 0
    assert engine("prune", "--all").exit_code == 0
    assert not cache.folder.exists()


def test_inspect_counts_the_nodes_of_a_graph(cache: EngineCache) -> None:
    _, new = two_entries(cache)
    (new.folder / "model.onnx.data").rename(cache.folder / "elsewhere")  # the weights are not needed
    done = engine("inspect", new.key.digest[:8].upper())
    assert done.exit_code == 0, done.output
    flat = re.sub(r"[ │]+", " ", done.stdout)
    for part in (
        f"digest {new.key.digest}", "device sm_90", "options layers=[bold]", f"model_sha256 {'ab' * 32}",
        "model.onnx.data 2000 ", "model.onnx: 7 nodes; 1 QuantizeLinear, 2 DequantizeLinear", "Relu 2 ", "Add 1 ",
        "input x float batch x 4 x ? ", "output y float16 batch x 4 x 2000 ",
    ):  # fmt: skip
        assert part in flat, part
    assert "scale" not in flat


def test_inspect_without_onnx_says_what_to_install(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new = two_entries(cache)
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = engine("inspect", new.key.digest)
    assert done.exit_code == 0
    assert new.key.digest in done.stdout
    assert "pip install 'catimage-accel[onnx]'" in done.stderr


def test_inspect_shows_the_precision_of_tensorrts_layers(cache: EngineCache) -> None:
    def tensors(*formats: str) -> list[dict[str, Any]]:
        return [{"Name": "t", "Dimensions": [8, 4], "Format/Datatype": text} for text in formats]

    layers = [
        {"Name": "/conv_in [/]", "LayerType": "CaskConvolution", "Outputs": tensors("Half"),
         "Inputs": tensors("Thirty-two wide channel vectorized row major Int8 format.")},
        {"Name": "__myl_Cast", "LayerType": "kgen", "Inputs": tensors("Half", "Float"), "Outputs": tensors("Half")},
        {"Name": "shape", "LayerType": "Shape"},
        "only a name",
    ]  # fmt: skip
    entry = cache.get_or_build(KEY, written("layers.json", json.dumps({"Layers": layers, "Bindings": []}).encode()))
    done = engine("inspect", entry.key.digest[:10])
    assert done.exit_code == 0, done.output
    assert "layers.json: 4 layers: 2 - -> -; 1 int8 -> fp16; 1 fp16, fp32 -> fp16" in done.stdout
    flat = re.sub(r"[ │]+", " ", done.stdout)
    for row in ("/conv_in [/] CaskConvolution int8 fp16", "__myl_Cast kgen fp16, fp32 fp16", "shape Shape - -"):
        assert row in flat
    assert "only a name - - -" in flat


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"not json", b'{"Layers": 3}', b"\xff"])
def test_inspect_leaves_other_json_alone(cache: EngineCache, content: bytes) -> None:
    entry = cache.get_or_build(KEY, written("config.json", content))
    done = engine("inspect", entry.key.digest)
    assert done.exit_code == 0, done.output
    assert "layers:" not in done.stdout


@pytest.mark.parametrize("digest", [pytest.param("0x", id="of-none"), pytest.param("", id="empty")])
def test_inspect_wants_the_start_of_a_digest(cache: EngineCache, digest: str) -> None:
    two_entries(cache)
    done = engine("inspect", digest)
    assert done.exit_code == 2
    assert f"digest is {digest!r}, that of no engine; accepted: the start of one that" in done.stderr


def test_inspect_wants_the_start_of_one_digest(cache: EngineCache) -> None:
    keys = [replace(KEY, profile=f"rows={rows}") for rows in range(1, 18)]  # two of 17 start with the same of 16 digits
    for key in keys:
        cache.get_or_build(key, written("engine", b"x"))
    starts = Counter(key.digest[0] for key in keys)
    start, number = starts.most_common(1)[0]
    assert f"digest is {start!r}, that of {number} engines" in engine("inspect", start).stderr


def test_a_file_that_is_no_graph_is_told(cache: EngineCache) -> None:
    entry = cache.get_or_build(KEY, written("model.onnx", b"\xff" * 10))
    done = engine("inspect", entry.key.digest)
    assert done.exit_code == 2
    assert "model.onnx is not an ONNX model" in done.stderr


def test_verify_names_each_damaged_entry(cache: EngineCache) -> None:
    old, new = two_entries(cache)
    done = engine("verify")
    assert done.exit_code == 0
    assert "2 engines" in done.stderr
    assert "nothing damaged" in done.stderr
    assert done.stdout == ""
    os.truncate(old.folder / "unet.engine", 5)
    (new.folder / "model.onnx").unlink()
    done = engine("verify")
    assert done.exit_code == 1
    assert sorted(done.stdout.splitlines()) == sorted([
        f"{old.key.digest}: unet.engine is truncated: it has 5 bytes, entry.json says 2500000",
        f"{new.key.digest}: model.onnx is missing",
    ])  # fmt: skip
    assert "2 engines damaged" in done.stderr


def test_prune_makes_room_and_says_how_much(cache: EngineCache) -> None:
    old, new = two_entries(cache)
    (cache.folder / f".building-{'0' * 64}-12345678").mkdir()
    (cache.folder / f".building-{'0' * 64}-12345678" / "half").write_bytes(bytes(700))
    before = cache.disk_bytes()
    done = engine("prune", "--max-gb", 0.001)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{old.key.digest[:12]} unet int8 tensorrt {KEY.profile}: 2500000 bytes\n"
    freed = before - cache.disk_bytes()
    assert freed > 2500700
    assert f"removed 1 engine from {cache.folder}: {freed} bytes freed, {cache.disk_bytes()} left" in done.stderr
    assert [entry.key for entry in cache.entries()] == [new.key]
    assert engine("prune").stdout == ""
    assert engine("prune", "--all").stdout.startswith(new.key.digest[:12])
    assert cache.disk_bytes() == 0


def test_prune_keeps_what_the_environment_allows(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new = two_entries(cache)
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE_GB", "0.001")
    assert engine("prune").exit_code == 0
    assert [entry.key for entry in cache.entries()] == [new.key]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["prune", "--max-gb", "-1"], "--max-gb is -1.0; accepted: gigabytes", id="negative"),
        pytest.param(["prune", "--max-gb", "nan"], "--max-gb is nan", id="nan"),
        pytest.param(["prune", "--max-gb", "1", "--all"], "--all and --max-gb are given", id="both"),
    ],
)
def test_bad_arguments_remove_nothing(cache: EngineCache, arguments: list[str], told: str) -> None:
    two_entries(cache)
    done = engine(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(cache.entries()) == 2


def test_a_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE_GB", "plenty")
    for command in (["list"], ["verify"], ["prune"], ["inspect", "a"]):
        done = engine(*command)
        assert done.exit_code == 2
        assert "CATIMAGE_ENGINE_CACHE_GB is 'plenty'" in done.stderr
