"""What each block of a UNet costs in time, measured on the device and engine that is to run it."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from catimage_accel.efficient_unet import with_repeats
from catimage_accel.engines import Engine, LoadedEngines
from catimage_accel.engines.cache import EngineCache

ROUNDS = 21
WARMUP = 2
SHARED_PARTS = ("tokenizer", "text_encoder", "vae", "scheduler", "model_index.json")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one UNet call at ``rows`` rows: ``whole``, and what it is shorter by without each block."""

    engine: str
    device: str
    rows: int
    whole: float
    blocks: Mapping[str, float]

    def of(self, repeats: Mapping[str, int]) -> float:
        """The milliseconds that the table gives for an architecture (path -> copies; 1 where absent)."""
        return self.whole + sum((repeats[path] - 1) * self.blocks[path] for path in repeats)


class Stopwatch:
    """Times UNets of one model against each other on an engine; what it builds is in a folder of its own.

    Of each UNet that is for as long as its call is kept: a search measures hundreds.
    """

    def __init__(self, model: Path, engine: str, rows: int, device: torch.device) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; accepted: a whole number from 1")
        self.engine, self.rows, self.device = engine, rows, device
        self._folder = tempfile.TemporaryDirectory(prefix="catimage-latency-")
        self._model = Path(self._folder.name) / "model"
        self._model.mkdir()
        for part in SHARED_PARTS:
            if (model / part).exists():
                os.symlink((model / part).resolve(), self._model / part)
        self._made = 0

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def call(self, unet: UNet2DConditionModel) -> Callable[[], object]:
        """A function that runs ``unet`` once on the engine. Raises EngineUnavailable where the engine can't."""
        name = f"unet{self._made}"
        self._made += 1
        unet.save_pretrained(self._model / name)
        built = Path(self._folder.name) / "engines" / name
        engine = LoadedEngines(self.device, EngineCache(built), fall_back=False).get(self._model, name, (self.engine,))
        call = _one_call(engine, self.rows)
        for folder in (self._model / name, built):
            weakref.finalize(call, shutil.rmtree, folder, ignore_errors=True).atexit = False
        return call

    def compare(self, first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
        """(milliseconds of ``first``, how many times as fast ``second`` is): medians over rounds, in changing order.

        The ratio is taken within each round, so that what slows the machine down for a while slows both.
        """
        calls = [first, second]
        for call in calls * WARMUP:
            self._time(call)
        order, rounds = random.Random(0), []
        for _ in range(ROUNDS):
            taken = [0.0, 0.0]
            for index in order.sample([0, 1], 2):
                taken[index] = self._time(calls[index])
            rounds.append(taken)
        return statistics.median(one for one, _ in rounds), statistics.median(one / other for one, other in rounds)

    def _time(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)


def measure_latencies(
    unet: UNet2DConditionModel,
    paths: Sequence[str],
    stopwatch: Stopwatch,
    advance: Callable[[int], None] = lambda _: None,
) -> LatencyTable:
    """The table of ``unet``'s blocks at ``paths``: each left out in turn, beside the whole in the same rounds."""
    from catimage_accel.profiling import profiled_device

    whole = stopwatch.call(unet)
    wholes, faster = [], {}
    for path in paths:
        milliseconds, faster[path] = stopwatch.compare(whole, stopwatch.call(with_repeats(unet, {path: 0})))
        wholes.append(milliseconds)
        advance(1)
    middle = statistics.median(wholes)
    blocks = {path: max(middle - middle / ratio, 0.0) for path, ratio in faster.items()}
    return LatencyTable(stopwatch.engine, profiled_device(stopwatch.device), stopwatch.rows, middle, blocks)


def _one_call(engine: Engine, rows: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((rows, engine.channels, *engine.sample_size), generator=generator).to(engine.device)
    timestep = torch.linspace(1, 999, rows, device=engine.device)
    text = engine.gather(engine.encode_prompts([str(number) for number in range(rows)]))
    return lambda: engine.denoise(sample, timestep, text)
