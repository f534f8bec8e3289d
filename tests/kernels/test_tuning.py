"""Launch configs: which file and which entry, and how the best one of a device is found."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from typer.testing import CliRunner

from catimage_accel.cli import app
from catimage_accel.kernels import geglu, tuning
from catimage_accel.kernels.tuning.timing import Timing

pytest.importorskip("triton")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHARED_MEMORY = 232_448  # bytes a block may have on sm_90


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes entries ``(shape, mark)`` of the op "op" for a device; a device is called by its torch type."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "device_slug", lambda device: "default" if device.type == "cpu" else device.type)
    tuning.forget()

    def write(slug: str, *entries: tuple[dict[str, int], int]) -> None:
        content = [{"shape": shape, "config": {"mark": mark}} for shape, mark in entries]
        (tmp_path / f"op.{slug}.json").write_text(json.dumps(content))

    yield write
    tuning.forget()


def mark(device: torch.device, **shape: int) -> int:
    return tuning.launch_config("op", device, **shape)["mark"]


def test_an_earlier_name_decides_before_any_later_one(files: Callable[..., None]) -> None:
    files("default", ({"layout": 1, "pixels": 4096}, 1), ({"layout": 2, "pixels": 4096}, 2))
    assert [mark(CPU, layout=layout, pixels=2**30) for layout in (1, 2)] == [1, 2]


def test_a_tuned_file_covers_only_what_it_names(files: Callable[..., None]) -> None:
    files("default", ({"dim": 64}, 1), ({"dim": 256}, 2))
    files("cuda", ({"dim": 64, "keys": 77}, 3), ({"dim": 64, "keys": 4096}, 4))
    assert [mark(CUDA, dim=64, keys=keys) for keys in (64, 10_000)] == [3, 4]
    assert mark(CUDA, dim=256, keys=77) == 2
    assert [mark(CPU, dim=dim, keys=77) for dim in (64, 256)] == [1, 2]


def test_a_device_without_a_tuned_file_is_told_once_for_each_op(files: Callable[..., None]) -> None:
    files("default", ({"dim": 1}, 1))
    with pytest.warns(UserWarning, match=r"no launch configs of op were tuned on cuda: .*catimage bench tune"):
        assert mark(CUDA, dim=1) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mark(CUDA, dim=2)
        mark(CPU, dim=1)


def test_a_config_can_be_forced(files: Callable[..., None]) -> None:
    files("default", ({"dim": 1}, 1))
    with tuning.use_config("op", {"mark": 9}):
        assert mark(CPU, dim=1) == 9
        with tuning.use_config("other", {"mark": 8}):
            assert mark(CPU, dim=1) == 1
    assert mark(CPU, dim=1) == 1


def test_an_open_size_is_guarded_by_a_range(files: Callable[..., None]) -> None:
    """So that torch.compile does not compile anew for every resolution."""
    files("default", ({"pixels": 64}, 1), ({"pixels": 4096}, 2))
    env = ShapeEnv()
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    open_size = FakeTensorMode(shape_env=env).from_tensor(torch.empty(3000), symbolic_context=sizes).shape[0]
    assert mark(CPU, pixels=open_size) == 2
    assert env.guards
    assert not any("Eq" in str(guard.expr) for guard in env.guards)


@pytest.mark.parametrize(("last", "names"), [(1, {"CHUNK", "BLOCK"}), (2, {"CHUNK", "BLOCK_PIXELS"})])
@pytest.mark.parametrize("side", [8, 64, 512, 1024])
def test_a_layout_never_gets_the_others_config(last: int, names: set[str], side: int) -> None:
    assert names <= set(tuning.launch_config("group_norm", CPU, channels_last=last, pixels=side**2))


@pytest.mark.parametrize(
    "op", ["attention", "group_norm", "layer_norm", "geglu", "int8_linear", "int8_conv", "int8_quantize"]
)
def test_sweeps_are_short_and_whole(op: str) -> None:
    """Every shape has a choice of configs, with the names of the default's, and no more than can be tried."""
    module = import_module(f"catimage_accel.kernels.{op}.workload")
    for workload in module.workloads(2, torch.float16):
        names = set(tuning.launch_config(op, CPU, **workload.shape))
        configs = list(module.configs(workload.shape, SHARED_MEMORY))
        assert 2 <= len(configs) <= 40
        assert all(set(config) == names for config in configs)
        assert len({str(config) for config in configs}) == len(configs)


def test_attention_configs_fit_in_shared_memory() -> None:
    from catimage_accel.kernels.attention.workload import configs

    shape = {"itemsize": 2, "head_dim": 160, "keys": 256, "queries": 256}
    assert list(configs(shape, SHARED_MEMORY))
    rows = [c["BLOCK_M"] + 2 * c["num_stages"] * c["BLOCK_N"] for c in configs(shape, SHARED_MEMORY)]
    assert max(rows) * 160 * 2 <= SHARED_MEMORY
    assert not list(configs(shape, 1024))


class CountingTimer:
    """A clock that knows which config is fast: the one with the largest block."""

    def time(self, call: Callable[[], Any]) -> Timing:
        call()
        block = tuning.launch_config("geglu", CPU, width=1)["BLOCK_COLUMNS"]
        return Timing(1 / block, 0, 0, 1, False)


def test_the_fastest_config_that_is_right_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from catimage_accel.kernels.geglu.workload import of_size
    from catimage_accel.kernels.tuning import tune

    monkeypatch.setattr(tune, "BATCHES", (1,))
    configs = [{"BLOCK_ROWS": 2, "BLOCK_COLUMNS": columns, "num_warps": 4} for columns in (16, 32, 64, 48)]
    group = [of_size("one", torch.float32, (1, 5), 40), of_size("another", torch.float32, (1, 3), 40)]
    with ThreadPoolExecutor(1) as pool:
        tuned = tune.tune_shape(group, configs, CPU, CountingTimer(), pool)  # type: ignore[arg-type]
    assert tuned.entry == {"shape": {"width": 40}, "config": configs[2]}
    assert tuned.ms == {name: {"tuned": 1 / 64, "default": 1 / 16} for name in ("one", "another")}
    assert set(tuned.failed) == {str(configs[3]), "cuda"}  # 48 is no power of 2; geglu has no CUDA kernels


def test_a_config_with_a_wrong_result_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from catimage_accel.kernels.geglu.workload import of_size
    from catimage_accel.kernels.tuning import tune

    calls = count()

    def wrong_the_second_time(x: torch.Tensor, impl: str) -> torch.Tensor:
        return geglu(x, impl=impl) * (1 + (impl == "triton" and next(calls) == 1))

    monkeypatch.setattr(tune, "BATCHES", (1,))
    configs = [{"BLOCK_ROWS": 2, "BLOCK_COLUMNS": columns, "num_warps": 4} for columns in (16, 64)]
    workload = replace(of_size("one", torch.float32, (1, 5), 40), call=wrong_the_second_time)
    with ThreadPoolExecutor(1) as pool:
        tuned = tune.tune_shape([workload], configs, CPU, CountingTimer(), pool)  # type: ignore[arg-type]
    assert tuned.config == configs[0]
    assert "of what is allowed" in tuned.failed[str(configs[1])]


def test_the_faster_implementation_is_named_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from catimage_accel.kernels.geglu.workload import of_size
    from catimage_accel.kernels.tuning import tune

    def with_cuda_kernels(x: torch.Tensor, impl: str) -> torch.Tensor:
        return geglu(x, impl="reference" if impl == "cuda" else impl)

    monkeypatch.setattr(tune, "BATCHES", (1,))
    workload = replace(of_size("one", torch.float32, (1, 5), 40), call=with_cuda_kernels)
    least = tuning.launch_config("geglu", CPU, width=1)["BLOCK_COLUMNS"]  # what the clock has for them
    for columns, faster in ((least // 2, "cuda"), (least * 2, "triton")):
        config = {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": columns, "num_warps": 4}
        with ThreadPoolExecutor(1) as pool:
            tuned = tune.tune_shape([workload], [config], CPU, CountingTimer(), pool)  # type: ignore[arg-type]
        assert tuned.entry == {"shape": {"width": 40}, "config": config, "impl": faster}
        assert tuned.ms["one"] == {"tuned": 1 / columns, "default": 1 / columns, "cuda": 1 / least}


def test_a_quantized_layer_is_held_against_half_precision_and_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace
    from functools import partial

    from catimage_accel.kernels.int8_linear.workload import of_size
    from catimage_accel.kernels.tuning import tune

    def by_name(call: Any) -> Timing:
        call()
        name = call.args[1] if "run" in str(call.func) else "half"
        return Timing({"triton": 2.0, "int_mm": 1.0, "half": 4.0}[name], 0, 0, 1, False)

    class Timer:
        time = staticmethod(by_name)

    monkeypatch.setattr(tune, "BATCHES", (1,))
    config = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    workload = of_size("one", torch.float32, (1, 24), 16, 32, True)
    for libraries, faster, speedup in ((("int_mm",), "int_mm", 4.0), ((), None, 2.0)):
        half = partial(lambda arguments: partial(torch.zeros, 1))
        with ThreadPoolExecutor(1) as pool:
            [tuned] = [
                tune.tune_shape([replace(workload, libraries=libraries, rival=half)], [config], CPU, Timer(), pool)  # type: ignore[arg-type]
            ]
        assert (tuned.impl, tuned.speedup) == (faster, pytest.approx(speedup))
        assert tuned.entry["speedup"] == speedup
        assert tuned.ms["one"]["rival"] == 4.0


def test_a_measured_speedup_is_that_of_the_nearest_shape(files: Callable[..., None]) -> None:
    from catimage_accel.kernels.tuning.impl import measured_speedup

    files("cuda", ({"rows": 64}, 1), ({"rows": 4096}, 2))
    assert measured_speedup("op", CUDA, rows=64) is None
    path = tuning.FOLDER / "op.cuda.json"
    small, large = json.loads(path.read_text())
    path.write_text(json.dumps([small | {"speedup": 0.5}, large | {"speedup": 1.5}]))
    tuning.forget()
    assert [measured_speedup("op", CUDA, rows=rows) for rows in (1, 100, 2000)] == [0.5, 0.5, 1.5]
    assert measured_speedup("op", CPU, rows=64) is None


def test_shapes_that_the_devices_file_lacks_are_tuned_first(
    files: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from catimage_accel.kernels.tuning import tune

    entry = {"shape": {"width": 1}, "config": {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 128, "num_warps": 4}}
    (tuning.FOLDER / "geglu.default.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name in ("driver", "DeviceTimer"):
        monkeypatch.setattr(tune, name, MagicMock())
    monkeypatch.setattr(tune, "device_slug", tuning.device_slug)
    monkeypatch.setattr(tune, "tune_shape", lambda group, *rest: group[0].shape["width"])
    device = torch.device("cuda", 0)
    first, *others = list[Any](tune.tune("geglu", device))
    (tuning.FOLDER / "geglu.cuda.json").write_text(json.dumps([entry | {"shape": {"width": first}}]))
    tuning.forget()
    assert others
    assert list[Any](tune.tune("geglu", device)) == [*others, first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no CUDA device; bench tune accepts a CUDA device"),
        (["--device", "cpu"], "device is 'cpu'; bench tune accepts a CUDA device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_cuda_device_the_command_says_so_in_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "tune", *arguments])
    assert (done.exit_code, done.stderr) == (2, f"catimage: {message}\n")
