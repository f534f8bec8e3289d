"""Latencies of blocks, really measured on engines that run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from catimage_accel.efficient_unet import removable_blocks, with_repeats
from catimage_accel.engines.loading import load_unet
from catimage_accel.snapfusion.latency import LatencyTable, Stopwatch, measure_latencies

CPU = torch.device("cpu")


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_a_network_of_half_the_blocks_is_faster_on_the_engine(sd15_shaped: Path, engine: str) -> None:
    unet = load_unet(sd15_shaped, "unet", torch.float32)
    with Stopwatch(sd15_shaped, engine, 2, CPU) as stopwatch:
        thin = with_repeats(unet, dict.fromkeys(removable_blocks(unet), 0))
        milliseconds, faster = stopwatch.compare(stopwatch.call(unet), stopwatch.call(thin))
    assert milliseconds > 0
    assert faster > 1.5


def test_the_table_has_every_block_and_adds_up(tiny_sd_folder: Path) -> None:
    unet = load_unet(tiny_sd_folder, "unet", torch.float32)
    paths, told = removable_blocks(unet), []
    with Stopwatch(tiny_sd_folder, "eager", 2, CPU) as stopwatch:
        table = measure_latencies(unet, paths[:2], stopwatch, told.append)
    assert (table.engine, table.rows, list(table.blocks), told) == ("eager", 2, paths[:2], [1, 1])
    assert table.whole > 0
    assert all(0 <= cost < table.whole for cost in table.blocks.values())
    known = LatencyTable("eager", "test", 2, 10.0, {"a": 1.0, "b": 2.0})
    assert known.of({"a": 0, "b": 3}) == 13.0


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_what_is_built_of_a_network_goes_with_its_call(tiny_sd_folder: Path, engine: str) -> None:
    """A search measures hundreds of networks of gigabytes."""
    unet = load_unet(tiny_sd_folder, "unet", torch.float32)
    with Stopwatch(tiny_sd_folder, engine, 1, CPU) as stopwatch:
        whole = stopwatch.call(unet)
        folder = Path(stopwatch._folder.name)
        kept = files(folder)
        for _ in range(2):
            stopwatch.compare(whole, stopwatch.call(unet))
            assert files(folder) == kept
        whole()
    assert not folder.exists()


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_rows_are_checked(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="rows is 0; accepted: a whole number from 1"):
        Stopwatch(tiny_sd_folder, "eager", 0, CPU)
