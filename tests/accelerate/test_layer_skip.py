"""diffusers' layer skipping, by which its guiders perturb a model: on an accelerated UNet as on a plain one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from capturing import on_triton
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from torch import Tensor
from unets import SAMPLE, TEXT, tiny_unet

from catimage_accel.accelerate import accelerate

BLOCKS = "mid_block.attentions.0.transformer_blocks"
SKIPS = {
    "attention scores, as perturbed attention does": {"skip_attention": False, "skip_attention_scores": True},
    "attention": {"skip_attention": True},
    "feed forward": {"skip_attention": False, "skip_ff": True},
    "blocks": {"skip_attention": True, "skip_ff": True},
}


@torch.no_grad()
def noise(pipe: SimpleNamespace) -> Tensor:
    return pipe.unet(SAMPLE, torch.tensor(500), TEXT).sample


@pytest.mark.parametrize("first", ["skipped", "accelerated"])
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_layers_are_skipped_where_kernels_run(
    skip: dict[str, bool], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LayerSkipConfig(indices=[0], fqn=BLOCKS, **{"skip_ff": False, **skip})
    plain = SimpleNamespace(unet=tiny_unet())
    whole = noise(plain)
    apply_layer_skip(plain.unet, config)
    wanted = noise(plain)
    assert (wanted - whole).abs().max() > 1e-3

    pipe = SimpleNamespace(unet=tiny_unet())
    if first == "skipped":
        apply_layer_skip(pipe.unet, config)
        accelerate(pipe)
    else:
        accelerate(pipe)
        apply_layer_skip(pipe.unet, config)
    launched = on_triton(monkeypatch, "attention")
    torch.testing.assert_close(noise(pipe), wanted, atol=1e-5, rtol=0)
    assert launched  # by the layers that are not skipped


def test_a_default_device_is_no_reason_for_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = accelerate(SimpleNamespace(unet=tiny_unet()))
    launched = on_triton(monkeypatch, "attention")
    with torch.device("cpu"):  # as torch.set_default_device
        noise(pipe)
    assert len(launched) == len(pipe.unet.attn_processors)
