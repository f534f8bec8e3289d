"""Blocks out of the ordinary: fused where that is the same, left to diffusers' own code elsewhere."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from unets import tiny_unet

from catimage_accel.accelerate import AccelerationReport, accelerate, acceleration_report, restore

SAMPLE, TEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)


def predict(unet: UNet2DConditionModel, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return unet(SAMPLE, 500, TEXT, **arguments).sample


def report(unet: UNet2DConditionModel) -> AccelerationReport:
    return acceleration_report(SimpleNamespace(unet=unet))


def count(unet: UNet2DConditionModel) -> tuple[int, int]:
    """Fused time embeddings and residuals."""
    found = report(unet)
    return len(found.group_norm_shift), len(found.layer_norm_residual)


RESNETS, RESIDUALS = 8, 8  # of ``tiny_unet``


@pytest.mark.parametrize(
    ("config", "shifts", "residuals", "reason"),
    [
        ({}, RESNETS, RESIDUALS, None),
        ({"resnet_out_scale_factor": 2.0}, RESNETS, RESIDUALS, None),
        ({"resnet_skip_time_act": True}, RESNETS, RESIDUALS, None),
        ({"only_cross_attention": True}, RESNETS, RESIDUALS, None),
        ({"upcast_attention": True}, RESNETS, RESIDUALS, None),
        ({"resnet_time_scale_shift": "scale_shift"}, 0, RESIDUALS, "its time_embedding_norm is 'scale_shift'"),
        ({"attention_type": "gated"}, RESNETS, 0, "it has GLIGEN's attention"),
        (
            {"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")},
            RESNETS, RESIDUALS, "it resamples",
        ),
    ],
    ids=[
        "plain", "blocks scale their result", "time embedding comes activated", "self-attention looks at the text",
        "upcast attention", "time embedding also scales", "GLIGEN", "blocks that resample",
    ],
)  # fmt: skip
def test_same_result(config: dict[str, Any], shifts: int, residuals: int, reason: str | None) -> None:
    unet = tiny_unet(**config)
    expected = predict(unet)
    pipe = accelerate(SimpleNamespace(unet=unet))
    torch.testing.assert_close(predict(unet), expected, atol=1e-5, rtol=1e-5)
    assert count(unet) == (shifts, residuals)
    assert set(report(unet).left_alone.values()) == ({reason} if reason else set())
    restore(pipe)
    torch.testing.assert_close(predict(unet), expected, atol=0, rtol=0)


def test_gligen_inputs_go_diffusers_way() -> None:
    unet = tiny_unet(attention_type="gated")
    for module in unet.modules():
        if hasattr(module, "alpha_attn"):
            module.alpha_attn.data.fill_(1.0)
            module.alpha_dense.data.fill_(1.0)
    gligen = {"boxes": torch.rand(2, 3, 4), "masks": torch.ones(2, 3), "positive_embeddings": torch.randn(2, 3, 32)}
    expected = predict(unet, cross_attention_kwargs={"gligen": dict(gligen)})
    assert (expected - predict(unet)).abs().max() > 1e-5
    accelerate(SimpleNamespace(unet=unet))
    actual = predict(unet, cross_attention_kwargs={"gligen": dict(gligen)})
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_chunks_switched_on_and_off() -> None:
    unet = tiny_unet()
    expected = predict(unet)
    accelerate(SimpleNamespace(unet=unet))
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.set_chunk_feed_forward(1, dim=0)
    torch.testing.assert_close(predict(unet), expected, atol=1e-5, rtol=1e-5)
    assert set(report(unet).left_alone.values()) == {"it feeds forward in chunks"}
    for block in blocks:
        block.set_chunk_feed_forward(None)
    assert count(unet) == (RESNETS, RESIDUALS)


@pytest.mark.parametrize("case", ["chunks", "GLIGEN", "autocast", "mask"])
def test_what_is_out_of_the_ordinary_compiles_whole(case: str) -> None:
    torch.compiler.reset()
    unet = tiny_unet(attention_type="gated" if case == "GLIGEN" else "default")
    arguments: dict[str, Any] = {}
    if case == "chunks":
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(1, dim=0)
    elif case == "GLIGEN":
        arguments["cross_attention_kwargs"] = {"gligen": {"objs": torch.randn(2, 3, 32)}}
        unet.position_net = torch.nn.Module()
        unet.position_net.forward = lambda objs: objs
    elif case == "mask":
        arguments["encoder_attention_mask"] = torch.ones(2, 5, dtype=torch.bool)
    accelerate(SimpleNamespace(unet=unet))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        torch.testing.assert_close(predict(compiled, **arguments), predict(unet, **arguments), atol=1e-2, rtol=1e-2)


def test_training_goes_diffusers_way() -> None:
    unet = tiny_unet(dropout=0.2).train()
    results = []
    for each in (copy.deepcopy(unet), accelerate(SimpleNamespace(unet=unet)).unet):
        torch.manual_seed(3)
        results.append(each(SAMPLE, 500, TEXT).sample)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_goes_into_a_norm(when: str) -> None:
    """The sum with the residual or the time embedding, and the norm's own result."""
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    seen: dict[str, list[Tensor]] = {"plain": [], "accelerated": []}

    def listen(model: UNet2DConditionModel, to: list[Tensor]) -> None:
        block = model.mid_block
        for norm in (block.resnets[0].norm2, block.attentions[0].transformer_blocks[0].norm3):
            norm.register_forward_hook(lambda module, args, output: to.extend([args[0], output]))

    listen(plain, seen["plain"])
    pipe = SimpleNamespace(unet=unet)
    if when == "before":
        listen(unet, seen["accelerated"])
    accelerate(pipe)
    if when == "after":
        listen(unet, seen["accelerated"])
    torch.testing.assert_close(predict(unet), predict(plain), atol=1e-5, rtol=1e-5)
    # A norm that was fused with its SiLU before the hook came gives the SiLU's result.
    which = [0, 1, 2, 3] if when == "before" else [0, 2, 3]
    torch.testing.assert_close(
        [seen["accelerated"][i] for i in which], [seen["plain"][i] for i in which], atol=1e-5, rtol=1e-5
    )
    assert count(unet) == (RESNETS - 1, RESIDUALS - 1)


def test_replaced_forwards_are_called() -> None:
    """As offloading does it: weights are only there while a module's own ``forward`` runs."""
    unet = tiny_unet()
    expected = predict(unet)
    called: list[str] = []

    class Note(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            called.append(names[module])
            return args, kwargs

    names = {module: name for name, module in unet.named_modules() if not list(module.children())}
    for leaf in names:
        add_hook_to_module(leaf, Note())
    predict(unet)
    plain = sorted(called)
    called.clear()
    accelerate(SimpleNamespace(unet=unet))
    torch.testing.assert_close(predict(unet), expected, atol=1e-5, rtol=1e-5)
    assert sorted(called) == plain


def test_lower_precision(sd: StableDiffusionPipeline) -> None:
    """Sums that torch rounds to the dtype are the same sums."""
    unet = sd.unet.to(torch.bfloat16)
    with torch.no_grad():
        expected = unet(SAMPLE.bfloat16(), 500, TEXT.bfloat16()).sample
        accelerate(sd)
        torch.testing.assert_close(unet(SAMPLE.bfloat16(), 500, TEXT.bfloat16()).sample, expected, atol=0.02, rtol=0.02)
