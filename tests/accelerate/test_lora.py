"""LoRA by peft, and IP-Adapter, loaded into pipelines that are or will be accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capturing import Compiler
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from pictures import draw, state
from safetensors.torch import load_file

from catimage_accel.accelerate import accelerate, acceleration_report, restore
from catimage_accel.accelerate.cuda_graphs import GraphedForward

Change = Callable[[StableDiffusionPipeline, Path], dict[str, Any] | None]
# Every kind of layer beside which or in which something is fused.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"],
    "text_encoder": ["q_proj", "v_proj", "fc1"],
}


def layers_of(pipe: StableDiffusionPipeline, adapter: str) -> dict[str, Any]:
    """What ``save_lora_weights`` takes."""
    return {
        f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name), adapter_name=adapter) for name in TARGETS
    }


@pytest.fixture
def lora(sd: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """Two LoRAs with an effect that shows, as diffusers saves them."""
    for seed, name in enumerate(("first", "second")):
        pipe = copy.deepcopy(sd)
        torch.manual_seed(seed)
        for part, targets in TARGETS.items():
            getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        pipe.save_lora_weights(tmp_path / name, **layers_of(pipe, "default"))
    return tmp_path


def loaded(pipe: StableDiffusionPipeline, folder: Path) -> None:
    pipe.load_lora_weights(folder / "first", adapter_name="first")


def scaled(pipe: StableDiffusionPipeline, folder: Path) -> dict[str, Any]:
    loaded(pipe, folder)
    return {"cross_attention_kwargs": {"scale": 0.3}}


def two_weighted(pipe: StableDiffusionPipeline, folder: Path) -> None:
    loaded(pipe, folder)
    draw(pipe)
    pipe.load_lora_weights(folder / "second", adapter_name="second")
    pipe.set_adapters(["first", "second"], adapter_weights=[0.7, 0.4])


def switched_off(pipe: StableDiffusionPipeline, folder: Path) -> None:
    two_weighted(pipe, folder)
    draw(pipe)
    pipe.disable_lora()


def fused(pipe: StableDiffusionPipeline, folder: Path) -> None:
    loaded(pipe, folder)
    draw(pipe)
    pipe.fuse_lora(lora_scale=0.8)


def fused_and_unloaded(pipe: StableDiffusionPipeline, folder: Path) -> None:
    fused(pipe, folder)
    pipe.unload_lora_weights()


def unfused(pipe: StableDiffusionPipeline, folder: Path) -> None:
    fused(pipe, folder)
    draw(pipe)
    pipe.unfuse_lora()


def unloaded(pipe: StableDiffusionPipeline, folder: Path) -> None:
    loaded(pipe, folder)
    draw(pipe)
    pipe.unload_lora_weights()


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (loaded, scaled, two_weighted, switched_off, fused, fused_and_unloaded, unfused, unloaded)
}
WITHOUT_EFFECT = (switched_off, unloaded)


def draw_changed(pipe: StableDiffusionPipeline, change: Change, folder: Path) -> torch.Tensor:
    return draw(pipe, **(change(pipe, folder) or {}))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_picture_is_that_of_the_plain_pipeline(
    when: str, change: Change, sd: StableDiffusionPipeline, lora: Path
) -> None:
    bare = draw(sd)
    plain = copy.deepcopy(sd)
    expected = draw_changed(plain, change, lora)
    assert ((expected - bare).abs().max() > 1e-2) != (change in WITHOUT_EFFECT)
    if when == "before":
        arguments = change(sd, lora) or {}
        picture = draw(accelerate(sd), **arguments)
    else:
        draw(accelerate(sd))
        picture = draw_changed(sd, change, lora)
    torch.testing.assert_close(picture, expected, atol=1e-4, rtol=0)
    for part in TARGETS:
        assert list(getattr(sd, part).state_dict()) == list(getattr(plain, part).state_dict())
    loras = [module for module in sd.unet.modules() if isinstance(module, LoraLayer)]
    assert bool(loras) != (change in (fused_and_unloaded, unloaded))


def test_what_is_saved_stays(sd: StableDiffusionPipeline, lora: Path, tmp_path: Path) -> None:
    accelerate(sd)
    loaded(sd, lora)
    draw(sd)
    sd.save_lora_weights(tmp_path / "again", **layers_of(sd, "first"))
    saved, again = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("first", "again"))
    assert list(again) == list(saved)
    torch.testing.assert_close(again, saved, atol=0, rtol=0)


def test_the_report_says_that_lora_projects_the_prompt_in_every_step(sd: StableDiffusionPipeline, lora: Path) -> None:
    cached = acceleration_report(accelerate(sd)).text_cache
    loaded(sd, lora)
    report = acceleration_report(sd)
    assert not report.text_cache
    assert {f"{name}.to_k" for name in cached} <= set(report.left_alone)


def test_restore_keeps_the_lora_and_unloading_the_kernels(sd: StableDiffusionPipeline, lora: Path) -> None:
    draw(sd)
    before, report = state(sd), acceleration_report(accelerate(sd))
    loaded(sd, lora)
    with_lora = draw(sd)
    torch.testing.assert_close(draw(restore(sd)), with_lora, atol=1e-4, rtol=0)
    accelerate(sd)
    sd.unload_lora_weights()
    assert acceleration_report(sd) == report
    assert {name: kind for name, kind in state(restore(sd)).items() if name.endswith("processor")} == {
        name: kind for name, kind in before.items() if name.endswith("processor")
    }


def test_compiled_models_compile_anew(sd: StableDiffusionPipeline, lora: Path, compiler: Compiler) -> None:
    """As one graph with LoRA's layers in it."""
    plain = copy.deepcopy(sd)
    accelerate(sd, compile=True)
    draw(sd)
    assert compiler.graphs == 2
    torch.testing.assert_close(draw_changed(sd, loaded, lora), draw_changed(plain, loaded, lora), atol=1e-4, rtol=0)
    assert compiler.graphs == 3
    assert set(acceleration_report(sd).compiled) == {"unet", "vae.decoder"}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_cuda_graphs_are_captured_anew(
    change: Change, sd: StableDiffusionPipeline, lora: Path, captures: list[Any]
) -> None:
    expected = draw_changed(copy.deepcopy(sd), change, lora)
    accelerate(sd)
    sd.unet.forward = GraphedForward(sd.unet, sd.unet.forward)
    draw(sd)
    assert len(captures) == 1
    arguments = change(sd, lora) or {}
    captured = len(captures)
    torch.testing.assert_close(draw(sd, **arguments), expected, atol=1e-4, rtol=0)
    assert len(captures) > captured


def load_ip_adapter(pipe: StableDiffusionPipeline) -> None:
    """With weights made here, as the file of one holds them."""
    torch.manual_seed(3)
    projection = {"proj.weight": torch.randn(128, 16), "proj.bias": torch.zeros(128),
                  "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}  # fmt: skip
    layers = {}
    crossed = (name for name in pipe.unet.attn_processors if "attn2" in name)
    for index, name in enumerate(crossed):
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{kind}.weight"] = torch.randn(layer.inner_dim, 32) / 4
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_ip_adapter_keeps_its_layers(when: str, sd: StableDiffusionPipeline) -> None:
    image: dict[str, Any] = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    bare, plain = draw(sd), copy.deepcopy(sd)
    load_ip_adapter(plain)
    expected = draw(plain, **image)
    assert (expected - bare).abs().max() > 1e-3
    if when == "before":
        load_ip_adapter(sd)
        with pytest.warns(UserWarning, match=r"left \d+ attention layers .*IPAdapterAttnProcessor2_0.*attn2"):
            accelerate(sd)
    else:
        load_ip_adapter(accelerate(sd))
    torch.testing.assert_close(draw(sd, **image), expected, atol=1e-4, rtol=0)
    report = acceleration_report(sd)
    crossed = [f"unet.{name.removesuffix('.processor')}" for name in sd.unet.attn_processors if "attn2" in name]
    assert all(report.left_alone[name] == "its processor is a IPAdapterAttnProcessor2_0" for name in crossed)
    assert len(report.attention) == len(sd.unet.attn_processors) - len(crossed) > 0
    torch.testing.assert_close(draw(restore(sd), **image), expected, atol=1e-5, rtol=0)
