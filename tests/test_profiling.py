"""Profiles: FLOPs as the models run them, times, and scores that survive interruption."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from catimage_accel import Candidate, Catalog
from catimage_accel.engines import DeepFeatures, EagerEngine
from catimage_accel.executor import Executor
from catimage_accel.profiling import count_flops, time_candidates
from catimage_accel.scoring import image_seed, score_candidates


def counted(call: object, *inputs: object) -> int:
    # The plain path of attention: the counter knows no fused CPU kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call(*inputs)  # type: ignore[operator]
    return counter.get_total_flops()


def candidate(name: str, steps: int, guidance_scale: float, **options: int) -> Candidate:
    return Candidate(name, "model", steps, "ddim", guidance_scale, options=options)


@pytest.fixture(scope="module")
def flops(tiny_catalog: Path) -> dict[str, int]:
    catalog = dataclasses.replace(
        Catalog.load(tiny_catalog),
        candidates=(
            candidate("1", 1, 1.0), candidate("2", 2, 1.0), candidate("10", 10, 1.0), candidate("guided", 10, 3.0),
            candidate("cached", 10, 1.0, deepcache_interval=3),
        ),
    )  # fmt: skip
    return count_flops(catalog)


def test_flops_are_those_of_text_encoder_steps_and_decoder(flops: dict[str, int], tiny_catalog: Path) -> None:
    model = tiny_catalog / "model"
    engine = EagerEngine(model)
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    encode = counted(text, torch.zeros(1, 24, dtype=torch.long))
    decode = counted(vae.decode, torch.zeros(1, 4, 16, 16))
    whole = counted(unet, torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 24, 32))
    batch = engine.gather(engine.encode_prompts(["a dog"]))
    step = counted(engine.denoise, torch.zeros(1, 4, 16, 16), torch.zeros(1), batch)
    assert step < whole  # keys and values of the text are computed once a prompt
    assert flops["1"] == encode + whole + decode
    assert flops["2"] - flops["1"] == step
    assert flops["10"] - flops["1"] == 9 * step
    assert flops["guided"] - decode == 2 * (flops["10"] - decode)


def test_deepcache_counts_what_the_engine_runs(flops: dict[str, int], tiny_catalog: Path) -> None:
    engine = EagerEngine(tiny_catalog / "model")
    batch = engine.gather(engine.encode_prompts(["a dog"]))
    deep = DeepFeatures()
    inputs = torch.zeros(1, 4, 16, 16), torch.zeros(1), batch
    refresh = counted(lambda: engine.denoise(*inputs, deep=deep))
    deep.refresh = ()
    between = counted(lambda: engine.denoise(*inputs, deep=deep))
    assert between < refresh
    # Of ten steps the first, fourth, seventh and tenth are refreshes.
    assert flops["10"] - flops["cached"] == 6 * (refresh - between)


def test_times_grow_with_steps(tiny_catalog: Path) -> None:
    catalog = dataclasses.replace(
        Catalog.load(tiny_catalog), candidates=(candidate("few", 2, 1.0), candidate("many", 200, 1.0))
    )
    told: list[int] = []
    times = time_candidates(catalog, Executor(resolve_model=catalog.resolve_model), (1, 2), told.append)
    assert sum(told) == 2
    for batch in ("1", "2"):
        assert 0 < times["few"][batch] < times["many"][batch]


class Brightness:
    """A metric that needs no model, and can be interrupted."""

    name, higher_is_better, range = "brightness", True, (0.0, 255.0)

    def __init__(self, batches: int = 1000) -> None:
        self.left = batches

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return np.array([image.mean() for image in images])


def scored(folder: Path, metric: Brightness, seeds: Sequence[int] = (0,)) -> int:
    catalog = Catalog.load(folder, verify=False)
    executor = Executor(resolve_model=catalog.resolve_model)
    return score_candidates(catalog, executor, metric, ["a dog", "a cat", "a bee", "a dog"], seeds, chunk=2)  # type: ignore[arg-type]


@pytest.fixture
def bare(tiny_catalog: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    (folder / "quality.parquet").unlink()
    return folder


def table(folder: Path) -> dict[tuple[str, str, int], float]:
    rows = pyarrow.parquet.read_table(folder / "quality.parquet").to_pylist()
    return {(row["prompt"], row["candidate"], row["seed"]): row["score"] for row in rows}


def test_an_interrupted_profile_goes_on_where_it_was(bare: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(bare, tmp_path / "whole"))
    assert scored(whole, Brightness()) == 9
    with pytest.raises(KeyboardInterrupt):
        scored(bare, Brightness(batches=1))
    assert len(table(bare)) == 6
    assert scored(bare, Brightness()) == 3
    assert table(bare) == pytest.approx(table(whole), abs=0.1)
    assert scored(bare, Brightness(batches=0)) == 0
    assert not list(bare.glob(".*"))


def test_every_candidate_draws_a_prompt_with_the_same_seed(bare: Path) -> None:
    assert scored(bare, Brightness(), seeds=(0, 1)) == 18
    expected = {image_seed(seed, prompt) for seed in (0, 1) for prompt in ("a dog", "a cat", "a bee")}
    assert len(expected) == 6
    for name in ("cheap-2", "middle-3", "dear-4"):
        assert {seed for _, candidate, seed in table(bare) if candidate == name} == expected


def test_scores_of_a_changed_candidate_are_drawn_again(bare: Path) -> None:
    scored(bare, Brightness())
    path = bare / "catalog.toml"
    path.write_text(path.read_text().replace("steps = 4", "steps = 3"))
    before = table(bare)
    assert scored(bare, Brightness()) == 3
    changed = {name for key, score in table(bare).items() if score != before[key] for name in [key[1]]}
    assert changed == {"dear-4"}


def test_other_metrics_rows_stay(bare: Path, tiny_catalog: Path) -> None:
    shutil.copy(tiny_catalog / "quality.parquet", bare)
    scored(bare, Brightness())
    assert len(Catalog.load(bare, verify=False).quality_table()) == 14
