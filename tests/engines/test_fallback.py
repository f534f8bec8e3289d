"""Which engine is taken when the first can't be: the next, never silently, and the eager one in the end."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_unets import compare

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.onnxruntime import OnnxRuntime, OnnxRuntimeRunner
from catimage_accel.engines.openvino import OpenVINORunner
from catimage_accel.engines.registry import ENGINES, LoadedEngines, find_runtime, precisions_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catimage_accel.engines.unavailable._told", set())


def collected(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``call`` returns and its UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in caught if one.category is UserWarning]


def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("catimage_accel.engines.openvino._core", Core)


def build_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("Exception from core.cpp:1:\nout of registers\nin node 3")

    monkeypatch.setattr(OpenVINORunner, "_compile", fail)


def disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("catimage_accel.engines.openvino.export", full)


def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OpenVINORunner.__call__

    def call(self: OpenVINORunner, inputs: Any) -> Any:
        return {name: value * float("nan") for name, value in whole(self, inputs).items()}

    monkeypatch.setattr(OpenVINORunner, "__call__", call)


CAUSES = [
    pytest.param(no_package, "fp32", "openvino not installed: pip install 'catimage-accel[cpu]'", id="no package"),
    pytest.param(no_bfloat16, "bf16", "this processor has no bfloat16 arithmetic", id="precision"),
    pytest.param(build_fails, "fp32", "openvino can't run the unet: out of registers", id="build fails"),
    pytest.param(disk_is_full, "fp32", "the disk is full", id="disk is full"),
    pytest.param(not_finite, "fp32", "gives noise that is not finite", id="NaN"),
]


@pytest.mark.parametrize(("damage", "precision", "reason"), CAUSES)
def test_the_next_engine_runs_and_one_warning_says_why(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[pytest.MonkeyPatch], None], precision: str, reason: str,
) -> None:  # fmt: skip
    damage(monkeypatch)
    following = "onnxruntime" if precision == "fp32" else "eager"
    engines = LoadedEngines(CPU, EngineCache(tmp_path))
    wanted = ("openvino", "onnxruntime") if precision == "fp32" else ("openvino",)

    def get(deepcache: bool = False) -> Any:
        return engines.get(tiny_sd_folder, engines=wanted, precision=precision, deepcache=deepcache)

    engine, told = collected(get)
    assert engine.name == following
    [text] = told
    assert text.startswith("engine 'openvino' can't run here: ")
    assert reason in text
    assert text.endswith(f"Next is {following!r}")
    assert "\n" not in text
    assert collected(get) == (engine, [])
    assert collected(lambda: get(deepcache=True)) == (engine, [])
    assert collected(lambda: LoadedEngines(CPU, EngineCache(tmp_path)).get(
        tiny_sd_folder, engines=wanted, precision=precision
    ))[1] == [], "said once a process"  # fmt: skip
    if precision == "fp32":
        compare(engine, engines.get(tiny_sd_folder), 3)


def test_only_deepcache_fails(tiny_sd_folder: Path, engine_cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OnnxRuntimeRunner.__call__

    def call(self: OnnxRuntimeRunner, inputs: Any) -> Any:
        if self._component.name != "unet":
            raise EngineUnavailable("no deep blocks")
        return whole(self, inputs)

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", call)
    engines = LoadedEngines(CPU, engine_cache)
    assert engines.get(tiny_sd_folder, engines=("onnxruntime",)).name == "onnxruntime"
    engine, told = collected(lambda: engines.get(tiny_sd_folder, engines=("onnxruntime",), deepcache=True))
    assert engine.name == "eager"
    assert len(told) == 1
    assert engines.get(tiny_sd_folder, engines=("onnxruntime",)).name == "onnxruntime"


@pytest.mark.parametrize("part", ["unet", "vae_decoder"])
def test_what_fails_while_it_runs_is_done_by_eager(
    tiny_sd_folder: Path, engine_cache: EngineCache, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    engines = LoadedEngines(CPU, engine_cache)
    engine, eager = (engines.get(tiny_sd_folder, engines=(name,)) for name in ("onnxruntime", "eager"))
    whole, asked = OnnxRuntimeRunner.__call__, []

    def call(self: OnnxRuntimeRunner, inputs: Any) -> Any:
        if self._component.name == part:
            asked.append(part)
            raise EngineUnavailable("out of memory")
        return whole(self, inputs)

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", call)

    def both() -> None:
        for rows in (2, 3):
            compare(engine, eager, rows)
        latents = torch.randn((2, 4, 16, 16))
        for _ in range(2):
            torch.testing.assert_close(engine.decode(latents), eager.decode(latents), atol=1e-5, rtol=1e-4)

    told = collected(both)[1]
    assert len(told) == 1
    assert "out of memory" in told[0]
    assert asked == [part], "given up, not asked again"


def test_eager_is_the_last_resort(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "why_not", lambda *_: "out of order")
    monkeypatch.setitem(sys.modules, "openvino", None)
    engines = LoadedEngines(CPU, EngineCache(tmp_path))
    engine, told = collected(lambda: engines.get(tiny_sd_folder, engines=("openvino", "onnxruntime")))
    assert engine.name == "eager"
    assert len(told) == 2
    assert "Next is 'onnxruntime'" in told[0]
    assert "out of order. Next is 'eager'" in told[1]


@pytest.mark.parametrize(
    ("engine", "precision", "message"),
    [
        pytest.param("fast", "fp32", "engine is 'fast'; accepted: eager, fused, compiled, triton, onnxruntime",
                     id="engine"),
        pytest.param("onnxruntime", "bf16", "precision is 'bf16' with engine 'onnxruntime'; accepted: fp32, int8",
                     id="one"),
        pytest.param("compiled", "int8", "precision is 'int8' with engine 'compiled'; accepted: fp32, bf16", id="two"),
        pytest.param("eager", "fp16", "precision is 'fp16' on device 'cpu'; accepted there: fp32, bf16", id="fp16"),
        pytest.param("eager", "int8", "precision is 'int8' and quantization None; accepted: a folder", id="no scales"),
        pytest.param("eager", "half", "precision is 'half' with engine 'eager'; accepted: fp32", id="precision"),
    ],
)  # fmt: skip
def test_what_can_never_be_is_refused(
    tiny_sd_folder: Path, engine_cache: EngineCache, engine: str, precision: str, message: str
) -> None:
    engines = LoadedEngines(CPU, engine_cache)
    for ask in (engines.check, engines.get):
        with pytest.raises(ValueError, match="^" + message):
            ask(tiny_sd_folder, "unet", (engine,), precision)


def test_scales_are_checked(tiny_sd_folder: Path, tiny_int8: Path, engine_cache: EngineCache) -> None:
    engines = LoadedEngines(CPU, engine_cache)
    with pytest.raises(ValueError, match=r"precision is 'fp8', but .* holds 'int8' scales"):
        engines.check(tiny_sd_folder, "unet", ("eager",), "fp8", tiny_int8)
    with pytest.raises(ValueError, match="precision is 'fp32' and quantization"):
        engines.check(tiny_sd_folder, "unet", ("eager",), "fp32", tiny_int8)
    with pytest.raises(FileNotFoundError, match=r"quantization\.json is missing"):
        engines.check(tiny_sd_folder, "unet", ("eager",), "int8", tiny_sd_folder)


def test_every_engine_has_precisions() -> None:
    for engine in ENGINES:
        assert ("int8" if engine == "triton" else "fp32") in precisions_of(engine)
    for engine in ENGINES[4:]:
        assert find_runtime(engine).name == engine
    with pytest.raises(ValueError, match="engine is 'eager'; accepted: onnxruntime"):
        find_runtime("eager")
