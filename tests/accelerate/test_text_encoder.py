"""CLIP's text encoders, of SD1.x's and SDXL's shape."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capturing import on_triton
from diffusers import StableDiffusionXLPipeline
from pictures import draw, state
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPAttention

from catimage_accel.accelerate import accelerate, acceleration_report, restore
from catimage_accel.accelerate.report import CAUSAL
from catimage_accel.kernels.accuracy import allowed_error, largest_error

LAYERS = 2
Encoder = CLIPTextModel | CLIPTextModelWithProjection


@pytest.fixture(params=["text_encoder", "text_encoder_2"], ids=["of SD and SDXL", "with projection, SDXL's second"])
def encoder(request: pytest.FixtureRequest, sdxl: StableDiffusionXLPipeline) -> Encoder:
    return getattr(sdxl, request.param).eval()


def encode(encoder: nn.Module, **arguments: Any) -> tuple[Tensor, ...]:
    """As SDXL's pipeline asks: all hidden states too."""
    ids = torch.tensor([[1, 7, 9, 2], [1, 5, 2, 2]])
    with torch.no_grad():
        out = encoder(ids, output_hidden_states=True, **arguments)
    return (out[0], *out.hidden_states)


def swapped(pipe: Any, encoder: nn.Module) -> Any:
    """A pipeline with this encoder."""
    return accelerate(SimpleNamespace(unet=pipe.unet, text_encoder=encoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_not_a_bit_changes(encoder: Encoder, dtype: torch.dtype, sdxl: StableDiffusionXLPipeline) -> None:
    encoder.to(dtype)
    expected = encode(encoder)
    before = state(sdxl)  # now that transformers has set its own hooks
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    masked = encode(encoder, attention_mask=mask)
    accelerate(sdxl)
    torch.testing.assert_close(encode(encoder), expected, atol=0, rtol=0)
    torch.testing.assert_close(encode(encoder, attention_mask=mask), masked, atol=0, rtol=0)
    assert len(expected) == LAYERS + 2
    restore(sdxl)
    assert state(sdxl) == before
    torch.testing.assert_close(encode(encoder), expected, atol=0, rtol=0)


def test_the_report_names_norms_and_says_why_not_attention(sdxl: StableDiffusionXLPipeline) -> None:
    report = acceleration_report(accelerate(sdxl))
    for root in ("text_encoder", "text_encoder_2"):
        modules = dict(getattr(sdxl, root).named_modules())
        norms = [f"{root}.{name}" for name, module in modules.items() if isinstance(module, nn.LayerNorm)]
        assert [name for name in report.layer_norm if name.startswith(f"{root}.")] == norms
        assert len(norms) == 2 * LAYERS + 1
        sums = [name for name in report.layer_norm_residual if name.startswith(f"{root}.")]
        assert sums == [name for name in norms if name.endswith("layer_norm2")]
        attention = [f"{root}.{name}" for name, module in modules.items() if isinstance(module, CLIPAttention)]
        assert [report.left_alone[name] for name in attention] == [CAUSAL] * LAYERS


def test_the_kernel_runs_within_the_accuracy_rule(
    encoder: Encoder, sdxl: StableDiffusionXLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Triton, in the interpreter."""
    expected, exact = encode(encoder), encode(copy.deepcopy(encoder).double())
    swapped(sdxl, encoder)
    launched = on_triton(monkeypatch, "layer_norm")
    for ours, torchs, reference in zip(encode(encoder), expected, exact, strict=True):
        assert largest_error(ours, reference) <= allowed_error(torchs, reference)
    assert len(launched) == 2 * LAYERS + 1


def test_hooks_see_the_sum(encoder: Encoder, sdxl: StableDiffusionXLPipeline) -> None:
    seen: list[Tensor] = []
    hooked = next(module for name, module in encoder.named_modules() if name.endswith("layers.1.layer_norm2"))
    hooked.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    encode(encoder)
    pipe = swapped(sdxl, encoder)
    encode(encoder)
    torch.testing.assert_close(seen[2:], seen[:2], atol=0, rtol=0)
    assert len(acceleration_report(pipe).layer_norm_residual) == LAYERS - 1 + residuals_of_the_unet(sdxl)


def residuals_of_the_unet(sdxl: StableDiffusionXLPipeline) -> int:
    return len(acceleration_report(SimpleNamespace(unet=sdxl.unet)).layer_norm_residual)


def test_gradients_are_those_of_the_plain_encoder(encoder: Encoder, sdxl: StableDiffusionXLPipeline) -> None:
    """Checkpointed too, as when text encoders are trained."""
    gradients = []
    for each in (copy.deepcopy(encoder), swapped(sdxl, encoder).text_encoder):
        each.train()
        each.gradient_checkpointing_enable()
        each(torch.tensor([[1, 7, 9, 2]]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_prompts_of_a_pipeline_stay(sdxl: StableDiffusionXLPipeline) -> None:
    """``clip_skip`` takes a hidden state from further within."""
    expected = draw(sdxl), draw(sdxl, clip_skip=1)
    accelerate(sdxl)
    torch.testing.assert_close((draw(sdxl), draw(sdxl, clip_skip=1)), expected, atol=1e-4, rtol=0)


def test_other_text_encoders_are_left_alone(sdxl: StableDiffusionXLPipeline) -> None:
    bert = BertModel(BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).eval()
    classes = [type(module) for module in bert.modules()]
    pipe = swapped(sdxl, bert)
    assert [type(module) for module in bert.modules()] == classes
    assert acceleration_report(pipe).left_alone == {"text_encoder": "it is a BertModel"}
