"""``accelerate`` and ``restore`` on small random pipelines: SD1.x's and SD2.x's shape (v-prediction), and SDXL's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from capturing import on_triton
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from pictures import draw, state
from torch import nn
from unets import tiny_unet

from catimage_accel.accelerate import AccelerationReport, accelerate, acceleration_report, restore
from catimage_accel.accelerate.report import CAUSAL


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_same_image_and_exact_restore(family: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(family)
    expected = draw(pipe)
    before = state(pipe)  # now that transformers has set its own hooks

    assert accelerate(pipe) is pipe
    torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=0)
    report = acceleration_report(pipe)
    assert len(report.attention) == len(pipe.unet.attn_processors) + len(pipe.vae.attn_processors)
    resnets = [m for part in (pipe.unet, pipe.vae) for m in part.modules() if isinstance(m, ResnetBlock2D)]
    assert len(report.group_norm_silu) == 2 * len(resnets) + 3  # and the last norms of UNet, encoder and decoder
    assert len(report.group_norm) == sum("attentions" in name for name in report.group_norm) > 0
    timed = [name for name, m in pipe.unet.named_modules() if isinstance(m, ResnetBlock2D)]
    assert report.group_norm_shift == tuple(f"unet.{name}.norm2" for name in timed)
    blocks = [name for name, m in pipe.unet.named_modules() if isinstance(m, BasicTransformerBlock)]
    norms = [name for name in report.layer_norm if name.startswith("unet")]
    assert norms == [f"unet.{name}.norm{i}" for name in blocks for i in (1, 2, 3)]
    norms = [name for name in report.layer_norm_residual if name.startswith("unet")]
    assert norms == [f"unet.{name}.norm{i}" for name in blocks for i in (2, 3)]
    assert report.text_cache == tuple(f"unet.{name}.attn2" for name in blocks)
    assert len(report.geglu) == sum(isinstance(m, GEGLU) for m in pipe.unet.modules()) == len(blocks) > 0
    assert set(report.left_alone.values()) == {CAUSAL}

    assert restore(pipe) is pipe
    assert state(pipe) == before
    torch.testing.assert_close(draw(pipe), expected, atol=0, rtol=0)


def test_the_kernels_run(sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Triton, in the interpreter: the swapped modules send the right arguments to the real kernels."""
    sample, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = sd.unet(sample, 500, text).sample
        accelerate(sd)
        ops = {"attention", "geglu", "group_norm", "layer_norm"}
        launched = on_triton(monkeypatch, *ops)
        torch.testing.assert_close(sd.unet(sample, 500, text).sample, expected, atol=1e-4, rtol=0)
    assert set(launched) == ops


def test_projections_fused_meanwhile_do_not_bring_processors_back(sd: StableDiffusionPipeline) -> None:
    before = sd.unet.attn_processors
    accelerate(sd).fuse_qkv_projections()
    restore(sd).unfuse_qkv_projections()
    assert sd.unet.attn_processors == before


def test_the_report_names_a_unet_that_makes_texts_of_its_own() -> None:
    """As Kolors' does, whose prompt is projected in every step."""
    unet = tiny_unet(encoder_hid_dim_type="text_proj", encoder_hid_dim=16)
    report = acceleration_report(accelerate(SimpleNamespace(unet=unet)))
    assert report.attention
    assert not report.text_cache
    assert "projected anew" in report.left_alone["unet.encoder_hid_proj"]


def test_saves_what_it_would_have_saved(sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    sd.save_pretrained(tmp_path / "plain")
    accelerate(sd).save_pretrained(tmp_path / "accelerated")
    plain, accelerated = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "plain", tmp_path / "accelerated")
    )
    assert accelerated == plain


def test_weights_changed_meanwhile_stay(sd: StableDiffusionPipeline) -> None:
    """New parameter objects (``assign=True``), as loaders make them, are used at once and survive ``restore``."""
    accelerate(sd)
    doubled = {name: 2 * tensor for name, tensor in sd.unet.state_dict().items()}
    sd.unet.load_state_dict(doubled, assign=True)
    accelerated = draw(sd)
    torch.testing.assert_close(draw(restore(sd)), accelerated, atol=1e-4, rtol=0)


class Custom(AttnProcessor2_0):
    """Someone's own processor."""


def test_foreign_processors_are_left_alone_and_named(sd: StableDiffusionPipeline) -> None:
    processors = sd.unet.attn_processors
    first, second = list(processors)[:2]
    processors |= {first: Custom(), second: AttnProcessor()}
    sd.unet.set_attn_processor(dict(processors))
    with pytest.warns(UserWarning, match="left 2 attention layers .*AttnProcessor, Custom.*attn1.*attn2"):
        accelerate(sd)
    assert sd.unet.attn_processors[first] is processors[first]
    assert "Custom" in acceleration_report(sd).left_alone[f"unet.{first.removesuffix('.processor')}"]
    draw(sd)
    restore(sd)
    assert sd.unet.attn_processors == processors


def test_hooked_norms_keep_their_output(sd: StableDiffusionPipeline) -> None:
    """A hook on a norm must see the norm's output, not the SiLU's."""
    block = sd.unet.mid_block.resnets[0]
    seen: list[torch.Tensor] = []
    block.norm1.register_forward_hook(lambda module, args, output: seen.append(output))
    draw(sd)
    draw(accelerate(sd))
    torch.testing.assert_close(seen[len(seen) // 2 :], seen[: len(seen) // 2], atol=1e-4, rtol=0)


def test_repeating_and_sharing(sd: StableDiffusionPipeline) -> None:
    """A second pipeline over the same UNet sees it accelerated, and one ``restore`` restores it for both."""
    before = state(sd)
    other = StableDiffusionPipeline(**sd.components, requires_safety_checker=False)
    accelerate(accelerate(sd))
    assert acceleration_report(other) == acceleration_report(sd)
    restore(other)
    assert state(sd) == before
    report = acceleration_report(sd)
    assert isinstance(report, AccelerationReport)
    assert report.attention == report.group_norm == report.group_norm_silu == ()
    assert set(report.left_alone.values()) == {"not accelerated", CAUSAL}


def test_gradients_are_those_of_the_plain_unet(sd: StableDiffusionPipeline) -> None:
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32)
    gradients = []
    for pipe in (sd, accelerate(sd)):
        pipe.unet.zero_grad()
        pipe.unet(sample, 500, text).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in pipe.unet.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_autocast_and_masks_go_torchs_way(sd: StableDiffusionPipeline) -> None:
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32)
    mask = torch.arange(24).expand(2, 24) < 7

    def call() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return sd.unet(sample, 500, text, encoder_attention_mask=mask).sample

    expected = call()
    accelerate(sd)
    torch.testing.assert_close(call(), expected, atol=2e-2, rtol=0)


def test_compiles_whole(sd: StableDiffusionPipeline) -> None:
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = sd.unet(sample, 500, text).sample
        accelerate(sd)
        sd.unet = torch.compile(sd.unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(sd.unet(sample, 500, text).sample, expected, atol=1e-4, rtol=0)
        # Keys and values of a prompt would be constants of the graph.
        text.mul_(2)
        changed = sd.unet(sample, 500, text).sample
    restore(sd)
    assert acceleration_report(sd).attention == ()
    with torch.no_grad():
        torch.testing.assert_close(changed, sd.unet._orig_mod(sample, 500, text).sample, atol=1e-4, rtol=0)


def test_a_decoder_with_attention_compiles_whole(sdxl: StableDiffusionXLPipeline) -> None:
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = sdxl.vae.decoder(latents)
        decoder = torch.compile(accelerate(sdxl).vae.decoder, fullgraph=True, backend="eager")
        torch.testing.assert_close(decoder(latents), expected, atol=1e-4, rtol=0)


def test_diffusers_finds_its_blocks_by_class_name(sd: StableDiffusionPipeline) -> None:
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = sd.unet(sample, 500, text).sample
        accelerate(sd).unet.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(sd.unet(sample, 500, text).sample, expected, atol=1e-4, rtol=0)


def test_pickles_and_copies(sd: StableDiffusionPipeline) -> None:
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = accelerate(sd).unet(sample, 500, text).sample
        for again in (pickle.loads(pickle.dumps(sd.unet)), copy.deepcopy(sd.unet)):
            torch.testing.assert_close(again(sample, 500, text).sample, expected, atol=0, rtol=0)


def test_channels_last_survives(sd: StableDiffusionPipeline) -> None:
    sd.unet.to(memory_format=torch.channels_last)
    expected = draw(sd)
    torch.testing.assert_close(draw(accelerate(sd)), expected, atol=1e-4, rtol=0)


def test_bad_arguments(sd: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="tier is 'fastest'; accepted: 'lossless', 'high', 'fast'"):
        accelerate(sd, tier="fastest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pipe is a Linear with unet NoneType; accepted"):
        accelerate(nn.Linear(1, 1))
