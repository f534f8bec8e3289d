"""Layers and blocks in INT8 against the fake-quantized ones, one by one, and which of them there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from int8_unets import KEPT, PROMPTS, denoised, layer_inputs, relative_error, with_fake_unet
from torch import nn

from catimage_accel.engines import EagerEngine
from catimage_accel.engines.int8.layers import Int8Conv2d, Int8Linear, why_not_int8
from catimage_accel.engines.triton_int8 import TritonInt8Engine
from catimage_accel.quantize.fake import fake_layer
from catimage_accel.quantize.quantization import Quantization

BLOCKS = (ResnetBlock2D, Transformer2DModel)


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "SmoothQuant"])
@pytest.mark.parametrize("outputs", [False, True], ids=["floating-point result", "rounded result"])
def test_each_layer_is_its_fake_quantized_one(
    tiny_sd_folder: Path, saved: Callable[..., Path], smooth: bool, outputs: bool
) -> None:
    """Sums are exact here and float32 there: what is left is float32's, and a level where the result is rounded."""
    plain = EagerEngine(tiny_sd_folder)
    scales = Quantization.load(saved(outputs=outputs, smooth=smooth)).layers
    for name, x in layer_inputs(plain).items():
        if name in KEPT:
            continue
        module = plain.unet.get_submodule(name)
        kind: Any = Int8Conv2d if isinstance(module, nn.Conv2d) else Int8Linear
        ours, fake = kind(module, scales[name])(x), fake_layer(name, module, scales[name], "int8")(x)
        difference = (ours - fake).abs()
        close = difference <= 1e-5 * fake.abs().max()
        if outputs:
            amax = scales[name].output_amax
            assert amax is not None
            assert difference.max() <= 1.001 * amax / 127
            assert (~close).float().mean() < 0.01
        else:
            assert close.all(), name


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "SmoothQuant"])
@pytest.mark.parametrize("outputs", [False, True], ids=["floating-point results", "rounded results"])
def test_each_block_is_its_fake_quantized_one_but_for_ties(
    tiny_sd_folder: Path, saved: Callable[..., Path], outputs: bool, smooth: bool
) -> None:
    """With what quantizes its inputs, on the inputs that it has in the fake UNet: nothing cascades."""
    folder = saved(outputs=outputs, smooth=smooth)
    fake, ours = with_fake_unet(tiny_sd_folder, folder), TritonInt8Engine(tiny_sd_folder, quantization=folder)
    plain, ties = EagerEngine(tiny_sd_folder), []
    for engine in (plain, ours):
        engine._text.current = fake.gather(fake.encode_prompts(PROMPTS))
    calls: dict[str, Any] = {}
    for name, block in fake.unet.named_modules():
        if isinstance(block, BLOCKS):
            block.register_forward_hook(
                lambda _, x, named, y, name=name: calls.__setitem__(name, (x, named, y)), with_kwargs=True
            )
    denoised(fake)
    assert len(calls) == 12
    with torch.inference_mode():
        for name, (x, named, wanted) in calls.items():
            found, exact = (engine.unet.get_submodule(name)(*x, **named) for engine in (ours, plain))
            wanted, found, exact = (y[0] if isinstance(y, tuple) else y for y in (wanted, found, exact))
            ties.append(relative_error(found, wanted) / relative_error(wanted, exact))
    assert max(ties) < 0.1


def test_norms_quantize_for_the_layers_that_read_them(engine: TritonInt8Engine, saved: Callable[..., Path]) -> None:
    block = "down_blocks.1.resnets.0"
    transformer = "down_blocks.1.attentions.0"
    inner = f"{transformer}.transformer_blocks.0"
    reasons = {choice.name: choice.reason for choice in engine.layers}
    for layer, source in {
        f"{block}.conv1": f"{block}.norm1", f"{block}.conv2": f"{block}.norm2",
        f"{transformer}.proj_in": f"{transformer}.norm", f"{inner}.attn1.to_q": f"{inner}.norm1",
        f"{inner}.attn1.to_k": f"{inner}.norm1", f"{inner}.attn1.to_v": f"{inner}.norm1",
        f"{inner}.attn2.to_q": f"{inner}.norm2", f"{inner}.ff.net.0.proj": f"{inner}.norm3",
        f"{inner}.ff.net.2": f"{inner}.ff.net.0",
    }.items():  # fmt: skip
        assert reasons[layer] == f"its input is quantized by {source}"
    own = "its input is quantized by a kernel of its own"
    for layer in (f"{block}.conv_shortcut", f"{block}.time_emb_proj", f"{inner}.attn1.to_out.0", f"{inner}.attn2.to_k"):
        assert reasons[layer] == own
    seen: dict[str, torch.dtype] = {}
    hooks = [
        module.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].dtype))
        for name, module in engine.unet.named_modules()
        if isinstance(module, (Int8Conv2d, Int8Linear))
    ]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    assert {name for name, dtype in seen.items() if dtype != torch.int8} == {n for n in seen if reasons[n] == own}


def test_projections_with_other_scales_quantize_for_themselves(
    tiny_sd_folder: Path, saved: Callable[..., Path]
) -> None:
    folder = saved(smooth=True, separate_heads=True)
    reasons = {c.name: c.reason for c in TritonInt8Engine(tiny_sd_folder, quantization=folder).layers}
    inner = "down_blocks.1.attentions.0.transformer_blocks.0"
    for name in ("to_q", "to_k", "to_v"):
        assert reasons[f"{inner}.attn1.{name}"] == "its input is quantized by a kernel of its own"
    assert reasons[f"{inner}.attn2.to_q"] == f"its input is quantized by {inner}.norm2"
    assert reasons[f"{inner}.ff.net.2"] == "its input is quantized by a kernel of its own"


def test_layers_that_were_measured_to_be_slower_stay_as_they_are(
    tiny_sd_folder: Path, saved: Callable[..., Path], chip: Callable[[str, Any], None]
) -> None:
    """Linear layers win where results are wider; the two sizes of batch count alike."""
    config = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    shapes = [(64, 0.5), (256, 1.6)]
    chip("int8_linear", [
        {"shape": {"aligned": 2, "rows": 128, "out_features": out}, "config": config, "speedup": speedup}
        for out, speedup in shapes
    ])  # fmt: skip
    engine = TritonInt8Engine(tiny_sd_folder, quantization=saved())
    choices = {choice.name: choice for choice in engine.layers}
    inner = "down_blocks.1.attentions.0.transformer_blocks.0"
    slow, fast = choices[f"{inner}.attn1.to_q"], choices[f"{inner}.ff.net.0.proj"]
    assert (slow.precision, slow.speedup) == ("fp32", pytest.approx(0.5))
    assert slow.reason == "INT8 was measured to take 2.00 times as long at this size"
    assert type(engine.unet.get_submodule(slow.name)) is nn.Linear
    assert (fast.precision, fast.speedup) == ("int8", pytest.approx(1.6))
    assert choices["down_blocks.1.resnets.0.conv1"].precision == "int8"
    assert engine.encode_prompts([""])[0].prompt == ""
    assert denoised(engine).isfinite().all()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), r"groups 2"),
        (nn.Conv2d(8, 8, 3, dilation=2), r"dilation is \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Conv2d(8, 8, 3, padding=(1, 0)), r"padding is \(1, 0\)"),
        (nn.Conv2d(8, 8, 3, stride=(1, 2)), r"stride \(1, 2\)"),
        (nn.Conv2d(8, 8, 3, padding="same"), "padding is 'same'"),
        (nn.ConvTranspose2d(8, 8, 3), "it is a ConvTranspose2d"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_layers_without_a_kernel_say_so(layer: nn.Module, reason: str) -> None:
    assert re.search(reason, why_not_int8(layer) or "")
    assert why_not_int8(nn.Conv2d(8, 8, 3, padding=1)) is None


