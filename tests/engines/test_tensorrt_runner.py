"""How built TensorRT engines are loaded and run, with a stand-in for the device: no CUDA device is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_stand_in import CPU, PROFILE, Context, Engine, Lane, expected, stand_in

from catimage_accel.engines import EngineUnavailable
from catimage_accel.engines.cache import CacheEntry, EngineCache, EngineKey
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.tensorrt import runner as runner_module
from catimage_accel.engines.tensorrt.builder import Built
from catimage_accel.engines.tensorrt.contexts import Contexts
from catimage_accel.engines.tensorrt.execution import Bucket
from catimage_accel.engines.tensorrt.layers import LayerTable
from catimage_accel.engines.tensorrt.log import Log
from catimage_accel.engines.tensorrt.runner import ENGINE_FILE, TensorRTRunner

NO_FILE = Path("no such folder/kernels")


def bucket(lane: Lane, *, ahead_of_time: bool = False, profile: int = 1) -> tuple[Bucket, Context]:
    engine = Engine()
    library = stand_in(ahead_of_time=ahead_of_time)
    made = Bucket(library, engine, Contexts(library, engine, NO_FILE), profile, lane, Log())
    return made, engine.contexts[0]


def inputs(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn((rows, 4, 3, 5), generator=generator), "timestep": torch.rand(rows, generator=generator)
    }  # fmt: skip


@given(calls=st.lists(st.integers(1, 4), min_size=1, max_size=4), graph=st.sampled_from(["works", "refused", "empty"]))
def test_every_number_of_rows_gives_its_own_results(calls: list[int], graph: str) -> None:
    made, _ = bucket(Lane(graph=graph))
    batches = [inputs(rows, seed) for seed, rows in enumerate(calls)]
    results = [made.run(batch, len(batch["sample"]))["noise"] for batch in batches]
    for batch, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, expected(batch["sample"], batch["timestep"]))


def test_rows_that_fill_a_batch_up_are_zero() -> None:
    made, _ = bucket(Lane())
    made.run(inputs(4), 4)
    made.run(inputs(1), 1)
    assert made.inputs["sample"][1:].abs().max() == 0, "nothing is left of the call before"


@pytest.mark.parametrize(
    ("graph", "captured"),
    [("works", True), ("refused", False), ("empty", False)],
    ids=["captured", "an operation that can't be captured", "a capture that failed without an error"],
)
def test_a_graph_is_replayed_only_if_it_does_what_the_run_did(graph: str, captured: bool) -> None:
    lane = Lane(graph=graph)
    made, context = bucket(lane)
    first = inputs(3)
    torch.testing.assert_close(
        made.run(first, 3)["noise"], expected(first["sample"], first["timestep"]), msg="the outputs before the check"
    )
    assert made.captured is captured
    launched = len(context.streams)
    second = inputs(3, seed=1)
    torch.testing.assert_close(made.run(second, 3)["noise"], expected(second["sample"], second["timestep"]))
    assert len(context.streams) == launched + 1
    assert lane.replays == {"works": 2, "refused": 0, "empty": 1}[graph]


def test_a_caller_that_captures_gets_the_launch_itself() -> None:
    lane = Lane()
    made, _ = bucket(lane)
    made.run(inputs(2), 2)
    lane.capturing, replays = True, lane.replays
    made.run(inputs(2), 2)
    assert lane.replays == replays


def test_tensorrt_rtx_captures_by_itself() -> None:
    lane = Lane()
    made, _ = bucket(lane, ahead_of_time=True)
    made.run(inputs(2), 2)
    assert not made.captured
    assert lane.replays == 0


def test_a_refused_batch_is_told_in_one_line() -> None:
    log = Log()
    engine = Engine()
    library = stand_in(ahead_of_time=True)
    made = Bucket(library, engine, Contexts(library, engine, NO_FILE), 0, Lane(), log)
    engine.contexts[0].fails = True
    log.record("ERROR", "out of\nmemory")
    with pytest.raises(EngineUnavailable, match=r"^Stand-in refused the batch: out of memory$"):
        made.run(inputs(1), 1)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRTRunner]:
    """A runner over a stand-in; ``plans`` are what one build after the other comes to."""

    def make(*plans: bytes, profile: ShapeProfile = PROFILE) -> TensorRTRunner:
        built = iter(plans)
        library = stand_in(ahead_of_time=True)
        key = EngineKey("m", "unet", "fp32", "", "any", "onnx", "1", "any", "any")
        onnx = CacheEntry(key, tmp_path, 0, datetime.now(UTC), datetime.now(UTC), 0.0)
        monkeypatch.setattr(runner_module, "export_key", lambda component, precision: key)
        monkeypatch.setattr(runner_module, "export", lambda component, cache, high_precision: onnx)
        monkeypatch.setattr(runner_module, "Lane", Lane)
        monkeypatch.setattr(
            runner_module, "build_engine", lambda *_, **__: Built(next(built), LayerTable("log", {}, ()))
        )
        cache = EngineCache(tmp_path / "cache")
        return TensorRTRunner(library, Component(tmp_path, "unet"), profile, cache, CPU)

    return make


def test_one_context_serves_each_batch_size(made: Callable[..., TensorRTRunner]) -> None:
    runner = made(b"good")
    for rows in (1, 2, 3, 4, 1):
        batch = inputs(rows, rows)
        torch.testing.assert_close(runner(batch)["noise"], expected(batch["sample"], batch["timestep"]))
    [engine] = runner.library.engines  # type: ignore[attr-defined]
    assert [context.profile for context in engine.contexts] == [0, 1]


@pytest.mark.parametrize("left", [None, b"of another device"], ids=["at first", "of no use"])
def test_what_the_device_compiles_is_kept(made: Callable[..., TensorRTRunner], left: bytes | None) -> None:
    runner = made(b"good")
    [entry] = runner.build()
    folder = entry.folder.parent / "tensorrt"
    folder.mkdir()
    kept = folder / f"{entry.key.digest}.kernels"
    (folder / "gone.kernels").write_bytes(b"k")
    if left is not None:
        kept.write_bytes(left)
    for rows in (1, 2, 4, 3):
        runner(inputs(rows))
    assert [path.read_bytes() for path in folder.iterdir()] == [b"kk"], "one for each context; what is of no entry goes"
    again = made()
    again(inputs(1))
    [engine] = again.library.engines  # type: ignore[attr-defined]
    assert engine.kernels.content == b"kkk", "what was kept, and what the new context added"


@pytest.mark.parametrize(
    ("asked", "built"),
    [((2,), 1), ((1, 3, 4), 1), ((8,), 2)],
    ids=["fewer batch sizes", "others", "larger ones than there are"],
)
def test_an_engine_for_other_batch_sizes_serves_if_they_are_large_enough(
    made: Callable[..., TensorRTRunner], asked: tuple[int, ...], built: int
) -> None:
    made(b"good").build()
    runner = made(b"good", profile=replace(PROFILE, rows=asked))
    batch = inputs(1)
    torch.testing.assert_close(runner(batch)["noise"], expected(batch["sample"], batch["timestep"]))
    assert len(runner.cache.entries()) == built


def test_an_engine_that_does_not_load_is_built_again(made: Callable[..., TensorRTRunner]) -> None:
    runner = made(b"of another device", b"good")
    with pytest.warns(UserWarning, match="does not load here and is built again"):
        runner(inputs(2))
    [entry] = runner.build()
    assert (entry.folder / ENGINE_FILE).read_bytes() == b"good"


def test_an_engine_that_never_loads_is_not_used(made: Callable[..., TensorRTRunner]) -> None:
    runner = made(b"bad", b"bad")
    with (
        pytest.warns(UserWarning, match="built again"),
        pytest.raises(EngineUnavailable, match=r"^Stand-in 10\.0 can't load the engine: version 9 is not 10$"),
    ):
        runner(inputs(2))


def test_a_damaged_engine_is_built_again(made: Callable[..., TensorRTRunner]) -> None:
    runner = made(b"good", b"good")
    [entry] = runner.build()
    (entry.folder / ENGINE_FILE).write_bytes(b"gold")
    with pytest.warns(UserWarning, match="built again"):
        runner(inputs(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (inputs(5), r"the inputs have 5 rows; accepted: up to 4, of \(2, 4\)"),
        ({**inputs(2), "timestep": torch.zeros(3)}, r"rows are \{'sample': 2, 'timestep': 3\}"),
        ({**inputs(2), "sample": torch.zeros(2, 4, 5, 3)}, r"sample is \(2, 4, 5, 3\); accepted: \(2, 4, 3, 5\)"),
        (
            {"encoder_hidden_states": torch.zeros(2, 9, 3)},
            r"encoder_hidden_states is \(2, 9, 3\); accepted: \(2, 2, 3\)",
        ),
        ({"sample": torch.zeros(2, 4, 3, 5, device="meta")}, r"sample is on meta; accepted: cpu"),
        ({"timestep": torch.tensor(3.0)}, r"rows are \{'timestep': 0\}"),
    ],
    ids=[
        "more rows than any batch size",
        "rows that differ",
        "another size",
        "more text",
        "another device",
        "a scalar",
    ],
)
def test_inputs_that_the_profile_does_not_cover(
    made: Callable[..., TensorRTRunner], wrong: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made()(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": torch.zeros(2, 4, 3, 5)},
        {**inputs(2), "time_ids": torch.zeros(2, 6)},
        {**inputs(2), "sample": torch.zeros(2, 9, 3, 5)},
    ],
    ids=["one is missing", "one too many", "other channels"],
)
def test_inputs_that_the_graph_has_not(made: Callable[..., TensorRTRunner], wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"the inputs are \{.*accepted: \{'sample': \(2, 4, 3, 5\), 'timestep': \(2,\)\}"
    ):
        made(b"good")(wrong)
