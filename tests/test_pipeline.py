"""RoutedPipeline: diffusers' meaning of its arguments, routing by tradeoff and budget, bad input before work."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel import Catalog, RoutedPipeline
from catimage_accel.routing import BudgetPacer

EASY, CROWDED = "a dog", "a crown, a castle and three bees"
COSTS = {"cheap-2": 1.0, "middle-3": 3.0, "dear-4": 8.0}


@pytest.fixture(scope="module")
def pipeline(tiny_catalog: Path) -> RoutedPipeline:
    made = RoutedPipeline.from_pretrained(tiny_catalog, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_easy_prompts_go_to_the_cheap_candidate_and_crowds_to_the_dear_one(pipeline: RoutedPipeline) -> None:
    out = pipeline([EASY, CROWDED], tradeoff=0.05, generator=seeded(1, 2))
    assert [route.candidate for route in out.routes] == ["cheap-2", "dear-4"]
    assert [route.cost for route in out.routes] == [1.0, 8.0]
    assert [route.seed for route in out.routes] == [1, 2]
    assert [route.prompt for route in out.routes] == [EASY, CROWDED]
    assert all(set(route.predicted_quality) == set(COSTS) and route.milliseconds > 0 for route in out.routes)
    assert [image.size for image in out.images] == [(64, 64)] * 2
    json.dumps([route.as_dict() for route in out.routes], allow_nan=False)


def test_without_arguments_the_catalogs_own_tradeoff_holds(pipeline: RoutedPipeline) -> None:
    prompts = [EASY, CROWDED, "a bee, a star"]
    assert pipeline.route(prompts) == pipeline.route(prompts, tradeoff=pipeline.catalog.tradeoff)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.floats(1.0, 20.0))
@settings(max_examples=30, deadline=None)
def test_a_budget_holds_on_average(pipeline: RoutedPipeline, prompts: list[str], budget: float) -> None:
    costs = [route.cost for route in pipeline.route(prompts, budget=budget)]
    assert sum(costs) / len(costs) <= budget * (1 + 1e-9)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_higher_tradeoff_never_costs_more(pipeline: RoutedPipeline, one: float, two: float) -> None:
    low, high = sorted([one, two])
    prompts = [EASY, CROWDED, "a bee, a star", "three rockets and a cat"]
    spent = [sum(route.cost for route in pipeline.route(prompts, tradeoff=each)) for each in (low, high)]
    assert spent[1] <= spent[0]


def test_the_cheapest_candidate_that_reaches_a_quality_draws(pipeline: RoutedPipeline) -> None:
    prompts = [EASY, CROWDED]
    assert [route.candidate for route in pipeline.route(prompts, min_quality=0.25)] == ["cheap-2", "dear-4"]
    assert [route.candidate for route in pipeline.route(prompts, min_quality=-1)] == ["cheap-2"] * 2
    assert pipeline.route(prompts, min_quality=9.0) == pipeline.route(prompts, tradeoff=0)
    out = pipeline([CROWDED], min_quality=0.25, generator=seeded(1), output_type="latent")
    assert out.routes[0].candidate == "dear-4"


def test_a_pacer_is_charged_for_what_is_drawn_alone(pipeline: RoutedPipeline) -> None:
    pacer = pipeline.pacer(3.0)
    asked = pipeline.route([CROWDED] * 30, budget=pacer)
    assert pacer.images == 0
    with pytest.raises(ValueError, match="height is 63"):
        pipeline([CROWDED] * 30, budget=pacer, height=63)
    assert pacer.images == 0
    spent = 0.0
    for start in range(0, 30, 10):
        out = pipeline([CROWDED] * 10, budget=pacer, height=16, width=16, generator=seeded(*range(10)))
        assert [route.candidate for route in out.routes] == [each.candidate for each in asked[start : start + 10]]
        spent += sum(route.cost for route in out.routes)
    assert (pacer.images, pacer.spent) == (30, spent)
    assert pacer.mean_cost == pytest.approx(3.0, rel=0.1)
    with pytest.raises(ValueError, match=r"budget is 0\.1"):
        pipeline.pacer(0.1)


def test_one_generator_for_all_gives_diffusers_latents(pipeline: RoutedPipeline, tiny_catalog: Path) -> None:
    prompts = [EASY, CROWDED, ""]
    (generator,) = seeded(3)
    ours = pipeline(prompts, candidate="dear-4", generator=generator, output_type="latent").images
    theirs = StableDiffusionPipeline.from_pretrained(tiny_catalog / "model", local_files_only=True)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompts, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("candidate", COSTS)
def test_an_image_does_not_depend_on_the_others(pipeline: RoutedPipeline, candidate: str) -> None:
    options: dict[str, Any] = {"candidate": candidate, "output_type": "latent"}
    alone = pipeline(CROWDED, generator=seeded(5), **options).images
    among = pipeline([EASY, CROWDED, EASY], generator=seeded(4, 5, 6), **options).images
    torch.testing.assert_close(alone[0], among[1], atol=1e-4, rtol=0)


def test_a_route_tells_the_seed_that_was_drawn(pipeline: RoutedPipeline) -> None:
    out = pipeline([EASY, EASY], output_type="np")
    first, second = out.routes
    assert first.seed != second.seed
    again = pipeline(EASY, generator=seeded(second.seed), output_type="np").images[0]
    np.testing.assert_allclose(out.images[1], again, atol=1.01 / 255)


def test_images_of_a_prompt_stand_together_as_in_diffusers(pipeline: RoutedPipeline) -> None:
    out = pipeline([EASY, CROWDED], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="pt")
    assert out.images.shape == (4, 3, 64, 64)
    assert [route.prompt for route in out.routes] == [EASY, EASY, CROWDED, CROWDED]
    assert [route.seed for route in out.routes] == [0, 1, 2, 3]
    assert not torch.equal(out.images[0], out.images[1])


def test_output_types_are_one_picture(pipeline: RoutedPipeline) -> None:
    pil, array, tensor, latent = (
        pipeline(EASY, generator=seeded(1), output_type=kind, return_dict=False)[0]
        for kind in ("pil", "np", "pt", "latent")
    )
    assert array.shape == (1, 64, 64, 3)
    assert array.dtype == np.float32
    assert 0 <= array.min() <= array.max() <= 1
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round())
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert latent.shape == (1, 4, 16, 16)


def test_stream_hands_out_the_short_ones_first(pipeline: RoutedPipeline) -> None:
    drawn = list(pipeline.stream([CROWDED, EASY], tradeoff=0.05))
    assert [each.index for each in drawn] == [1, 0]
    assert [each.route.candidate for each in drawn] == ["cheap-2", "dear-4"]


def test_another_size(pipeline: RoutedPipeline) -> None:
    assert pipeline(EASY, height=48, width=32).images[0].size == (32, 48)


def test_the_callback_sees_every_step_and_may_change_latents(pipeline: RoutedPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def callback(pipe: RoutedPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipe is pipeline
        assert 0 <= float(timestep) < 1000
        seen.append((tensors["index"], step))
        return {"latents": torch.zeros_like(tensors["latents"])} if (tensors["index"], step) == (1, 3) else {}

    out = pipeline([EASY, CROWDED], tradeoff=0.05, callback_on_step_end=callback, output_type="latent")
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert out.images[0].abs().max() > 0
    assert out.images[1].abs().max() == 0


def test_what_the_callback_raises_reaches_the_caller(pipeline: RoutedPipeline) -> None:
    def callback(*_: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        pipeline(EASY, callback_on_step_end=callback)


def test_a_long_prompt_is_cut_off_with_one_warning(pipeline: RoutedPipeline) -> None:
    with pytest.warns(UserWarning, match="cut off") as caught:
        out = pipeline([EASY, "a lemon and " * 30 + "a dog"], candidate="cheap-2")
    assert len([warning for warning in caught if "cut off" in str(warning.message)]) == 1
    assert len(out.images) == 2


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        pytest.param({"prompt": []}, ["empty list", "at least 1"], id="no-prompts"),
        pytest.param({"prompt": None}, ["None", "string"], id="none"),
        pytest.param({"prompt": b"a dog"}, ["b'a dog'", "string"], id="bytes"),
        pytest.param({"prompt": ["a dog", 3]}, ["prompt 1 is 3", "string"], id="number-among-prompts"),
        pytest.param({"prompt": "a \ud800"}, ["prompt 0", "surrogates"], id="lone-surrogate"),
        pytest.param({"tradeoff": math.nan}, ["tradeoff is nan", ">= 0"], id="nan-tradeoff"),
        pytest.param({"tradeoff": -0.1}, ["tradeoff is -0.1", ">= 0"], id="negative-tradeoff"),
        pytest.param({"tradeoff": "0.1"}, ["tradeoff is '0.1'", ">= 0"], id="tradeoff-as-text"),
        pytest.param({"budget": 0.99}, ["budget is 0.99", "1 GFLOP", "cheap-2"], id="budget-under-the-cheapest"),
        pytest.param({"budget": math.inf}, ["budget is inf", "finite"], id="infinite-budget"),
        pytest.param({"budget": math.nan}, ["budget is nan", "finite"], id="nan-budget"),
        pytest.param({"candidate": "best"}, ["'best'", "cheap-2, middle-3, dear-4"], id="unknown-candidate"),
        pytest.param({"tradeoff": 0.1, "budget": 3.0}, ["tradeoff and budget", "one of"], id="two-policies"),
        pytest.param({"min_quality": 0.2, "candidate": "dear-4"}, ["min_quality and candidate"], id="least-and-fixed"),
        pytest.param({"min_quality": math.nan}, ["min_quality is nan", "finite"], id="nan-quality"),
        pytest.param({"min_quality": "high"}, ["min_quality is 'high'", "finite"], id="quality-as-text"),
        pytest.param({"budget": BudgetPacer([[0, 1]], [1, 2], 1.5)}, ["pacer for costs [1.0, 2.0]"], id="other-pacer"),
        pytest.param({"num_images_per_prompt": 0}, ["num_images_per_prompt is 0", ">= 1"], id="no-images"),
        pytest.param({"generator": seeded(1, 2)}, ["list of 2", "accepted: 1"], id="too-many-generators"),
        pytest.param({"generator": 7}, ["generator is 7", "torch.Generator"], id="seed-for-a-generator"),
        pytest.param({"output_type": "jpeg"}, ["'jpeg'", "pil, np, pt, latent"], id="unknown-output-type"),
        pytest.param({"height": 65}, ["height is 65", "multiples of 4"], id="odd-height"),
        pytest.param({"width": 0}, ["width is 0", "positive multiples of 4"], id="no-width"),
        pytest.param({"width": 64.0}, ["width is 64.0", "multiples of 4"], id="width-with-a-fraction"),
    ],
)
def test_bad_input_is_named_before_any_work(pipeline: RoutedPipeline, call: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the parts say which
        pipeline.stream(**{"prompt": "a dog", **call})
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("device", ["cuda:0", "gpu", 1.5])
def test_a_device_that_is_not_there_is_named(tiny_catalog: Path, device: Any) -> None:
    if torch.cuda.is_available() and device == "cuda:0":
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=f"device is {device!r}"):
        RoutedPipeline.from_pretrained(tiny_catalog, device=device)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoilt", "keep", "kind", "part"),
    [
        pytest.param(f"unet/{WEIGHTS}", 1000, ValueError, "can't be read", id="truncated-weights"),
        pytest.param(f"vae/{WEIGHTS}", 0, ValueError, "can't be read", id="empty-decoder"),
        pytest.param(f"vae/{WEIGHTS}", None, FileNotFoundError, "vae", id="missing-decoder"),
        pytest.param("text_encoder/config.json", None, FileNotFoundError, "text_encoder", id="missing-text-encoder"),
    ],
)
def test_unreadable_models_are_named_before_any_drawing(
    tiny_catalog: Path, tmp_path: Path, spoilt: str, keep: int | None, kind: type[Exception], part: str
) -> None:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    path = folder / "model" / spoilt
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[:keep])
    pipeline = RoutedPipeline(Catalog.load(folder, verify=False), "cpu")
    with pytest.raises(kind) as raised:
        pipeline.stream(EASY)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_catalog_without_router_draws_with_a_named_candidate(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    shutil.rmtree(folder / "router")
    pipeline = RoutedPipeline(Catalog.load(folder, verify=False), "cpu")
    (route,) = pipeline.route(EASY, candidate="middle-3")
    assert dataclasses.asdict(route) == {
        "prompt": EASY, "seed": 0, "candidate": "middle-3", "predicted_quality": {}, "cost": 3.0, "milliseconds": 0.0
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="router fit"):
        pipeline.route(EASY)


def test_a_size_may_be_numpys_numbers(pipeline: RoutedPipeline) -> None:
    out = pipeline(EASY, candidate="cheap-2", height=np.int64(64), width=np.int32(96), generator=seeded(1))  # type: ignore[arg-type]
    expected = pipeline(EASY, candidate="cheap-2", height=64, width=96, generator=seeded(1))
    assert out.images[0].size == (96, 64)
    assert out.images[0].tobytes() == expected.images[0].tobytes()


def test_the_hub_is_asked_once_for_a_model(tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return str(tiny_catalog / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    catalog = Catalog.load(tiny_catalog)
    candidates = tuple(dataclasses.replace(one, model="owner/tiny") for one in catalog.candidates)
    made = RoutedPipeline(dataclasses.replace(catalog, candidates=candidates), device="cpu")
    made.set_progress_bar_config(disable=True)
    for _ in range(2):
        made([EASY, CROWDED], generator=seeded(1, 2))
    assert asked == ["owner/tiny"]
