"""A whole search on a small model: latencies, robust training, rounds, and the network that is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from catimage_accel.efficient_unet import EfficientUNet
from catimage_accel.snapfusion.distill import finetune
from catimage_accel.snapfusion.evolution import search_architecture
from catimage_accel.snapfusion.latency import Stopwatch
from catimage_accel.snapfusion.search import UnreachableTarget

CPU = torch.device("cpu")
SEARCH = {"speedup": 1.2, "rows": 1, "prompts": 2, "steps": 1, "steps_between": 1, "saving": 0.1, "judge": "judge"}


@pytest.fixture
def thin(recipe: Callable[..., Path], tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a search's recipe. A network runs once on its engine, and is said to take as long as it has weights."""
    weights, run = {}, Stopwatch.call

    def call(self: Stopwatch, unet: torch.nn.Module) -> Callable[[], object]:
        made = run(self, unet)
        made()
        weights[made] = sum(p.numel() for p in unet.parameters())
        return made

    monkeypatch.setattr(Stopwatch, "call", call)
    monkeypatch.setattr(Stopwatch, "compare", lambda self, one, other: (10.0, weights[one] / weights[other]))
    (tmp_path / "words.txt").write_text("a dog\ntwo cats\n")

    def write(**changes: float) -> Path:
        search = SEARCH | {"prompt_file": "words.txt"} | changes
        return recipe("thin", model=str(tiny_sd_folder), search=search)

    return write


def test_what_is_found_is_faster_trains_on_and_is_found_again(
    recipe: Callable[..., Path], thin: Callable[..., Path], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    path, work = thin(), tmp_path / "work"
    found = EfficientUNet.from_pretrained(search_architecture(path, work, CPU))
    record = json.loads((work / "thin" / "run.json").read_text())
    state = json.loads((work / "thin" / "search.json").read_text())
    assert state["done"]
    assert found.config.block_repeats == dict.fromkeys(state["left_out"], 0)
    assert state["left_out"]
    assert state["rounds"][-1]["milliseconds"] <= state["table"]["whole"] / 1.2
    assert record["config"]["steps"] == 3 + len(state["rounds"])
    # Finished, it is not searched for again: only the network is written once more.
    before = (work / "thin" / "search.json").read_bytes()
    search_architecture(path, work, CPU)
    assert (work / "thin" / "search.json").read_bytes() == before
    tuned = finetune(recipe("tuned", model=str(tiny_sd_folder), student="run:thin"), work, CPU)
    assert EfficientUNet.from_pretrained(tuned).config.block_repeats == found.config.block_repeats


def test_several_processes_are_refused(
    thin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would measure latencies, and so find a network, of its own."""
    path = thin()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="distill architecture was launched in 2 processes; accepted: 1"):
        search_architecture(path, tmp_path / "work", CPU)


def test_a_speed_that_no_network_has_is_told_before_training(thin: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnreachableTarget, match=r"a speed-up of 50\.00; without all .* so at most"):
        search_architecture(thin(speedup=50.0), tmp_path / "work", CPU)
    assert not (tmp_path / "work" / "thin" / "checkpoint.safetensors").exists()
