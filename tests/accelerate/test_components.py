"""The models of a pipeline beside its UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from pictures import draw, state

from catimage_accel.accelerate import accelerate, acceleration_report, restore
from catimage_accel.accelerate.report import CAUSAL

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def new_controlnet(sd: StableDiffusionPipeline, seed: int) -> ControlNetModel:
    """With an effect: the last layers of an untrained one are zero."""
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 16, 16))
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.1)
    return controlnet.eval()


@pytest.mark.parametrize("count", [1, 2], ids=["one", "several are one component"])
def test_controlnet(sd: StableDiffusionPipeline, count: int) -> None:
    nets = [new_controlnet(sd, seed) for seed in range(count)]
    pipe = StableDiffusionControlNetPipeline(
        **sd.components, controlnet=nets[0] if count == 1 else nets, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.controlnet, MultiControlNetModel) == (count > 1)
    image = IMAGE if count == 1 else [IMAGE] * count
    before, uncontrolled, expected = state(pipe), draw(sd), draw(pipe, image=image)
    assert (expected - uncontrolled).abs().max() > 1e-3

    accelerate(pipe)
    torch.testing.assert_close(draw(pipe, image=image), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        draw(pipe, image=image, guess_mode=True), draw(restore(pipe), image=image, guess_mode=True), atol=1e-4, rtol=0
    )
    assert state(pipe) == before
    report = acceleration_report(accelerate(pipe))
    assert set(report.left_alone.values()) == {CAUSAL}
    for index in range(count):
        root = "controlnet." if count == 1 else f"controlnet.nets.{index}."
        for names in (report.attention, report.text_cache, report.group_norm_shift, report.layer_norm_residual):
            assert any(name.startswith(root) for name in names)


def other_decoder(kind: str) -> Any:
    torch.manual_seed(2)
    if kind == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        )  # fmt: skip
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        down_block_out_channels=(8, 8, 16), up_block_out_channels=(8, 8, 16), norm_num_groups=4, sample_size=64,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AsymmetricAutoencoderKL"])
def test_other_decoders_stay_as_they_are(sd: StableDiffusionPipeline, kind: str) -> None:
    sd.vae = other_decoder(kind).eval()
    before, expected = state(sd), draw(sd)
    accelerate(sd)
    torch.testing.assert_close(draw(sd), expected, atol=1e-4, rtol=0)
    report = acceleration_report(sd)
    assert set(report.left_alone.values()) == {CAUSAL}
    assert all(name.startswith("unet.") for name in report.group_norm_silu)
    assert state(restore(sd)) == before
