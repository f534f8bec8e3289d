"""The lossy tiers: deep features stand still between refreshes, and a refresh comes whenever a loop is another one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from capturing import Compiler
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from pictures import draw, state
from test_components import IMAGE, new_controlnet
from torch import Tensor
from unets import SAMPLE, TEXT, tiny_unet

from catimage_accel.accelerate import accelerate, acceleration_report, restore
from catimage_accel.accelerate.deep_cache import INTERVALS
from catimage_accel.engines.deepcache import enter, inside, leave

TIMES = torch.arange(950, 0, -50)  # 19 steps
LONG = torch.arange(980, 0, -20)  # 49 steps


@pytest.fixture
def pipe() -> SimpleNamespace:
    return SimpleNamespace(unet=tiny_unet())


@pytest.fixture
def refreshes(pipe: SimpleNamespace) -> list[int]:
    """One entry for each run of the deep blocks."""
    runs: list[int] = []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


@torch.no_grad()
def loop(unet: Any, times: Any = TIMES, sample: Tensor = SAMPLE, text: Tensor = TEXT, **arguments: Any) -> list[Tensor]:
    """What the UNet says at each step; the latents change as they would."""
    return [unet(sample * (1 + index), time, text, **arguments).sample for index, time in enumerate(times)]


@torch.no_grad()
def expected(unet: Any, interval: int, times: Tensor = TIMES) -> list[Tensor]:
    """By the parts of the UNet, as the executor runs them."""
    found: list[Tensor] = []
    for index, time in enumerate(times):
        outer = enter(unet, SAMPLE * (1 + index), time, TEXT, None)
        if index % interval == 0 or index == len(times) - 1:
            features = inside(unet, outer)
        found.append(leave(unet, outer, features))
    return found


@pytest.mark.parametrize(("tier", "number"), [("high", 25), ("fast", 17)])
def test_the_outermost_blocks_alone_run_between_refreshes(
    tier: str, number: int, pipe: SimpleNamespace, refreshes: list[int]
) -> None:
    wanted, plain = expected(pipe.unet, INTERVALS[tier], LONG), loop(pipe.unet, LONG)
    before = state(pipe)
    refreshes.clear()
    accelerate(pipe, tier=tier)
    made = loop(pipe.unet, LONG)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    assert len(refreshes) == number
    torch.testing.assert_close(made[0], plain[0], atol=1e-5, rtol=0)
    assert (made[1] - plain[1]).abs().max() > 1e-3
    assert acceleration_report(pipe).deep_cache_interval == INTERVALS[tier]
    assert state(restore(pipe)) == before
    assert acceleration_report(pipe).deep_cache_interval == 1
    torch.testing.assert_close(loop(pipe.unet, LONG), plain, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("tier", "steps", "interval"),
    [
        ("high", 9, 1), ("fast", 9, 1), ("high", 10, 2), ("fast", 10, 2), ("fast", 19, 2), ("fast", 20, 3),
        ("high", 50, 2), ("fast", 50, 3),
    ],
)  # fmt: skip
def test_features_are_never_older_than_a_tenth_of_the_loop(
    tier: str, steps: int, interval: int, pipe: SimpleNamespace, refreshes: list[int]
) -> None:
    """Few-step models change too much from step to step to keep anything."""
    accelerate(pipe, tier=tier)
    loop(pipe.unet, torch.linspace(990, 10, steps))
    assert len(refreshes) == sum(index % interval == 0 or index == steps - 1 for index in range(steps))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_pipeline_draws_again_what_it_drew(family: str, request: pytest.FixtureRequest) -> None:
    """And after it what it would have drawn at first: nothing stays of the picture before."""
    pipe = request.getfixturevalue(family)
    plain = draw(pipe, steps=10)
    before = state(pipe)
    accelerate(pipe, tier="high")
    first = draw(pipe, steps=10)
    assert (first - plain).abs().max() > 1e-4
    torch.testing.assert_close(draw(pipe, steps=10), first, atol=0, rtol=0)
    assert state(restore(pipe)) == before
    torch.testing.assert_close(draw(pipe, steps=10), plain, atol=0, rtol=0)


def again_from_the_start(unet: Any) -> None:
    loop(unet, TIMES[:2])
    loop(unet, TIMES[:2])


def another_text(unet: Any) -> None:
    loop(unet, TIMES[:1])
    loop(unet, TIMES[1:2], text=TEXT.clone())


def another_size(unet: Any) -> None:
    loop(unet, TIMES[:1])
    loop(unet, TIMES[1:2], sample=SAMPLE.repeat(1, 1, 2, 1))


def halves_of_the_guidance_in_turn(unet: Any) -> None:
    empty = torch.zeros_like(TEXT)
    for index in range(2):
        loop(unet, TIMES[index : index + 1], text=empty)
        loop(unet, TIMES[index : index + 1])


def the_last_of_an_even_number(unet: Any) -> None:
    loop(unet, TIMES[:10].clone())  # every other one, and the tenth


def perturbed_attention(unet: Any) -> None:
    for index in range(3):  # two passes a step with one text, which nothing tells apart
        loop(unet, TIMES[index : index + 1])
        loop(unet, TIMES[index : index + 1])


def numbers(unet: Any) -> None:
    loop(unet, [900, 700.0, 500])


def numbers_that_rise(unet: Any) -> None:
    loop(unet, [700, 900])


def a_tensor_a_step(unet: Any) -> None:
    kept = [torch.tensor(time) for time in (900, 700, 500)]
    loop(unet, kept)


def with_gradients(unet: Any) -> None:
    for time in TIMES[:2]:
        unet(SAMPLE, time, TEXT)


def with_an_adapter(unet: Any) -> None:
    def residuals() -> list[Tensor]:
        return [torch.ones(1, 16, 4, 4), torch.ones(1, 32, 4, 4)]

    for time in TIMES[:2]:
        loop(unet, time[None], down_intrablock_additional_residuals=residuals())


@pytest.mark.parametrize(
    ("calls", "number"),
    [
        (again_from_the_start, 2), (another_text, 2), (another_size, 2), (halves_of_the_guidance_in_turn, 2),
        (the_last_of_an_even_number, 6), (perturbed_attention, 6), (numbers, 2), (numbers_that_rise, 2),
        (a_tensor_a_step, 3), (with_gradients, 2), (with_an_adapter, 2),
    ],
    ids=lambda value: value.__name__.replace("_", " ") if callable(value) else "",
)  # fmt: skip
def test_refreshes(calls: Callable[[Any], None], number: int, pipe: SimpleNamespace, refreshes: list[int]) -> None:
    accelerate(pipe, tier="high")
    calls(pipe.unet)
    assert len(refreshes) == number


def test_nothing_is_kept_longer_than_the_text(pipe: SimpleNamespace) -> None:
    accelerate(pipe, tier="high")
    text = TEXT.clone()
    loop(pipe.unet, text=text)
    assert pipe.unet.forward.run._running
    del text
    assert not pipe.unet.forward.run._running


def test_a_call_that_fails_is_followed_by_a_refresh(pipe: SimpleNamespace, refreshes: list[int]) -> None:
    accelerate(pipe, tier="high")
    loop(pipe.unet, TIMES[:1])
    with pytest.raises(RuntimeError):
        loop(pipe.unet, TIMES[1:2], added_cond_kwargs={}, sample=torch.zeros(1, 3, 8, 8))
    loop(pipe.unet, TIMES[2:3])
    assert len(refreshes) == 2


def test_threads_take_turns(pipe: SimpleNamespace) -> None:
    accelerate(pipe, tier="high")
    samples = [SAMPLE * factor for factor in (1, 2, 3)]
    texts = [TEXT * factor for factor in (1, 2, 3)]
    alone = [loop(pipe.unet, sample=sample, text=text) for sample, text in zip(samples, texts, strict=True)]
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda index: loop(pipe.unet, sample=samples[index], text=texts[index]), range(3)))
    torch.testing.assert_close(made, alone, atol=1e-5, rtol=0)


def test_freeu_scales_a_copy(pipe: SimpleNamespace) -> None:
    """In a UNet of two up blocks it scales, in place, the very features that are kept."""
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    accelerate(pipe, tier="fast")
    features: list[Tensor] = []
    pipe.unet.up_blocks[0].register_forward_hook(lambda *call: features.append(call[-1].clone()))
    loop(pipe.unet, LONG[:3])
    torch.testing.assert_close(features[1:], [features[0]] * 2, atol=0, rtol=0)


def test_odd_sizes(pipe: SimpleNamespace) -> None:
    sample = SAMPLE[..., :7, :5]
    accelerate(pipe, tier="high")
    assert [out.shape for out in loop(pipe.unet, sample=sample)] == [sample.shape] * len(TIMES)


def test_a_controlnet_acts_between_refreshes(sd: StableDiffusionPipeline) -> None:
    pipe = StableDiffusionControlNetPipeline(
        **sd.components, controlnet=new_controlnet(sd, 0), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, tier="fast")
    second_step = {"control_guidance_start": 0.1, "control_guidance_end": 0.2}
    pictures = [
        draw(pipe, steps=10, image=IMAGE, controlnet_conditioning_scale=scale, **second_step) for scale in (0.0, 1.0)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_other_pipelines(kind: Any, sd: StableDiffusionPipeline) -> None:
    pipe = kind(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    mask = {"mask_image": torch.ones(1, 1, 64, 64)} if kind is StableDiffusionInpaintPipeline else {}
    arguments = {"steps": 10, "image": IMAGE, "strength": 1.0, **mask}
    plain = draw(pipe, **arguments)
    kept = draw(accelerate(pipe, tier="fast"), **arguments)
    assert kept.shape == plain.shape
    assert (kept - plain).abs().max() > 1e-4
    torch.testing.assert_close(draw(restore(pipe), **arguments), plain, atol=0, rtol=0)


def test_compiled_there_are_two_graphs_and_the_same_results(pipe: SimpleNamespace, compiler: Compiler) -> None:
    wanted = expected(pipe.unet, 2)
    accelerate(pipe, tier="high", compile=True)
    torch.testing.assert_close(loop(pipe.unet), wanted, atol=1e-4, rtol=0)
    assert compiler.graphs == 2
    torch.testing.assert_close(loop(pipe.unet, text=TEXT.clone()), wanted, atol=1e-4, rtol=0)
    assert compiler.graphs == 2
    report = acceleration_report(pipe)
    assert (report.compiled, report.deep_cache_interval) == ({"unet": "default"}, 2)


def test_the_last_call_decides(pipe: SimpleNamespace) -> None:
    before = state(pipe)
    for tier in ("fast", "high", "lossless"):
        assert acceleration_report(accelerate(pipe, tier=tier)).deep_cache_interval == INTERVALS[tier]
    torch.testing.assert_close(loop(pipe.unet), loop(restore(pipe).unet), atol=1e-4, rtol=0)
    assert state(pipe) == before


def test_copies_keep_features_of_their_own(pipe: SimpleNamespace) -> None:
    accelerate(pipe, tier="high")
    wanted = loop(pipe.unet)
    for again in (pickle.loads(pickle.dumps(pipe.unet)), copy.deepcopy(pipe.unet)):
        loop(pipe.unet, TIMES[:1])
        torch.testing.assert_close(loop(again), wanted, atol=1e-5, rtol=0)
        assert again.mid_block.deep_features is not pipe.unet.mid_block.deep_features


def test_hooks_that_outlive_the_tier(pipe: SimpleNamespace) -> None:
    """As offloading's, they hold on to the ``forward`` that they found."""
    plain = loop(pipe.unet)
    accelerate(pipe, tier="high")
    for module in (pipe.unet, pipe.unet.mid_block, pipe.unet.up_blocks[0], pipe.unet.down_blocks[1]):
        add_hook_to_module(module, ModelHook())
    torch.testing.assert_close(loop(pipe.unet), expected(pipe.unet, 2), atol=1e-5, rtol=0)
    restore(pipe)
    torch.testing.assert_close(loop(pipe.unet), plain, atol=1e-5, rtol=0)
    remove_hook_from_module(pipe.unet, recurse=True)


def one_block() -> Any:
    return tiny_unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip


def other_blocks() -> Any:
    return tiny_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D"))


def compiled() -> Any:
    unet = tiny_unet()
    unet.compile(backend="eager")
    return unet


def hooked() -> Any:
    unet = tiny_unet()
    add_hook_to_module(unet, ModelHook())
    return unet


@pytest.mark.parametrize(
    ("unet", "options", "message"),
    [
        (tiny_unet, {"tier": "fastest"}, "tier is 'fastest'; accepted: 'lossless', 'high', 'fast'"),
        (tiny_unet, {"tier": 2}, "tier is 2; accepted: 'lossless', 'high', 'fast'"),
        (tiny_unet, {"tier": "high", "cuda_graphs": True}, "tier is 'high', which .* CUDA graphs write over"),
        (tiny_unet, {"tier": "fast", "compile": "max-autotune"}, "with this tier: cuda_graphs=False and a mode"),
        (one_block, {"tier": "high"}, "has one up block; accepted: tier='lossless'"),
        (other_blocks, {"tier": "high"}, "unet.down_blocks.1 is a AttnDownBlock2D; accepted: blocks of the kinds"),
        (compiled, {"tier": "high"}, "tier 'high' is asked for, but unet was given to torch.compile already"),
        (hooked, {"tier": "high"}, "tier 'high' is asked for, but the forward of unet was replaced"),
    ],
    ids=[
        "unknown", "a number", "graphs", "a mode with graphs", "nothing is deep", "blocks that can't stand still",
        "compiled already", "offloaded already",
    ],
)  # fmt: skip
def test_what_cannot_be_leaves_the_pipeline_alone(
    unet: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    pipe = SimpleNamespace(unet=unet())
    before = state(pipe)
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, **options)
    assert state(pipe) == before
