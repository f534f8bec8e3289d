"""Where no kernel can run, the accelerated models run torch's own ops, to the bit."""

from __future__ import annotations

import pytest
import torch
from capturing import on_triton
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from catimage_accel.accelerate import accelerate, modules


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As outside of Triton's interpreter; the names of the norms' ops that run nevertheless."""
    monkeypatch.setattr(modules, "TRITON_INTERPRETS", False)
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
