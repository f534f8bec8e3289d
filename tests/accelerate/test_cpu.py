"""On a CPU: the C++ kernels where they suit, and else torch's own ops, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import on_triton
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from catimage_accel.accelerate import accelerate, modules, norms, restore
from catimage_accel.kernels import cpu


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As outside of Triton's interpreter; the names of the norms' ops that run nevertheless."""
    monkeypatch.setattr(modules, "TRITON_INTERPRETS", False)
    monkeypatch.setattr(cpu, "BUILT", False)
    return on_triton(monkeypatch, "group_norm", "layer_norm")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_same_bits_on_the_cpu(family: str, without_kernels: list[str], request: pytest.FixtureRequest) -> None:
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline = request.getfixturevalue(family)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe("a dog", num_inference_steps=2, generator=generator, output_type="pt").images

    plain = draw()
    accelerate(pipe)
    assert torch.equal(draw(), plain)
    assert without_kernels == []


def test_gradients_flow_on_the_cpu(sd: StableDiffusionPipeline, without_kernels: list[str]) -> None:
    """An activation in place would overwrite what they need."""
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 24, 32)

    def gradients() -> list[torch.Tensor]:
        sd.unet.zero_grad()
        sd.unet(latents, 500, text).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in sd.unet.parameters()]

    plain = gradients()
    accelerate(sd)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert without_kernels == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_channels_last_models_take_the_cpp_kernels(
    family: str, dtype: torch.dtype, cpu_norms: list[Tensor], request: pytest.FixtureRequest
) -> None:
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline = request.getfixturevalue(family)
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = pipe.vae.decode(latents).sample
    pipe.vae.to(dtype=dtype, memory_format=torch.channels_last)
    latents = latents.to(dtype).to(memory_format=torch.channels_last)
    theirs = pipe.vae.decode(latents).sample
    accelerate(pipe)
    assert cpu_norms == []
    ours = pipe.vae.decode(latents).sample
    assert len(cpu_norms) == sum(isinstance(module, norms.FusedGroupNorm) for module in pipe.vae.decoder.modules())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert ours.is_contiguous(memory_format=torch.channels_last)
    restore(pipe)
    assert torch.equal(pipe.vae.decode(latents).sample, theirs)


@torch.no_grad()
def test_a_unet_takes_its_time_embedding_into_the_cpp_kernels(
    sd: StableDiffusionPipeline, cpu_norms: list[Tensor]
) -> None:
    latents, text = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last), torch.randn(2, 24, 32)
    sd.unet.to(memory_format=torch.channels_last)
    theirs = sd.unet(latents, 500, text).sample
    accelerate(sd)
    torch.testing.assert_close(sd.unet(latents, 500, text).sample, theirs, atol=2e-5, rtol=2e-5)
    assert len(cpu_norms) == sum(isinstance(module, norms.FusedGroupNorm) for module in sd.unet.modules())


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(torch.enable_grad, id="gradients are asked for"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
    ],
)
def test_where_the_cpp_kernels_do_not_run(context: Any, sd: StableDiffusionPipeline, cpu_norms: list[Tensor]) -> None:
    accelerate(sd)
    sd.vae.to(memory_format=torch.channels_last)
    with torch.no_grad(), context():
        sd.vae.decode(torch.randn(1, 4, 16, 16).to(memory_format=torch.channels_last))
    assert cpu_norms == []


def test_double_stays_with_torch(sd: StableDiffusionPipeline, cpu_norms: list[Tensor]) -> None:
    accelerate(sd)
    sd.vae.to(dtype=torch.float64, memory_format=torch.channels_last)
    with torch.no_grad():
        sd.vae.decode(torch.randn(1, 4, 16, 16).double().to(memory_format=torch.channels_last))
    assert cpu_norms == []
