"""Profiles: FLOPs as the models run them, and times."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
            candidate("cached", 10, 1.0, deepcache_interval=3), candidate("cached-9", 9, 1.0, deepcache_interval=3),
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
    # Of nine steps the first, fourth, seventh and ninth: the last one is whole wherever it falls.
    assert flops["10"] - flops["cached-9"] == refresh + 5 * (refresh - between)


def test_times_grow_with_steps(tiny_catalog: Path) -> None:
    catalog = dataclasses.replace(
        Catalog.load(tiny_catalog), candidates=(candidate("few", 2, 1.0), candidate("many", 200, 1.0))
    )
    told: list[int] = []
    times = time_candidates(catalog, Executor(resolve_model=catalog.resolve_model), (1, 2), told.append)
    assert sum(told) == 2
    for batch in ("1", "2"):
        assert 0 < times["few"][batch] < times["many"][batch]
