"""The engine over the package's fused kernels: the eager one's results, and the kernels really run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from catimage_accel.accelerate import attention as processors
from catimage_accel.accelerate.attention import FusedAttnProcessor
from catimage_accel.engines import LoadedEngines
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.eager import EagerEngine
from catimage_accel.engines.fused import FusedEngine
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.kernels import cpu
from catimage_accel.kernels.build import CPU

needs_kernels = pytest.mark.skipif(not cpu.BUILT, reason=f"not built: {CPU.how_to_build}")


def denoised(engine: EagerEngine) -> torch.Tensor:
    text = engine.gather(engine.encode_prompts(["a dog", "", "two lemons"]))
    height, width = engine.sample_size
    sample = torch.randn(3, engine.channels, height, width, generator=torch.Generator().manual_seed(0))
    return engine.denoise(sample, torch.full((3,), 500), text)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_eager_engines_results_through_the_kernels(
    precision: str, tiny_sd_folder: Path, cpu_norms: list[torch.Tensor]
) -> None:
    fused = FusedEngine(tiny_sd_folder, precision=precision)
    exact = denoised(EagerEngine(tiny_sd_folder))
    assert cpu_norms == []
    ours = denoised(fused)
    assert len(cpu_norms) == sum(isinstance(module, nn.GroupNorm) for module in fused.unet.modules()) > 0
    assert ours.dtype == torch.float32
    if precision == "fp32":
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=2e-5)
    else:
        rounded = denoised(EagerEngine(tiny_sd_folder, precision=precision))
        assert 0 < (ours - exact).norm() < 1.25 * (rounded - exact).norm()


@needs_kernels
def test_both_kinds_of_attention_go_through_the_op(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(k.shape))
        return torch.zeros_like(q)

    monkeypatch.setattr(processors, "attention", seen)
    monkeypatch.setattr(FusedEngine, "attend", staticmethod(seen))
    engine = FusedEngine(tiny_sd_folder)
    layers = list(engine.unet.attn_processors.values())
    own = sum(isinstance(processor, FusedAttnProcessor) for processor in layers)
    assert 0 < own < len(layers)
    denoised(engine)
    tokens = [shape[1] for shape in calls]
    assert (len(calls), tokens.count(24)) == (len(layers), len(layers) - own)


def test_where_its_kernels_cannot_run_the_next_engine_does(
    tiny_sd_folder: Path, engine_cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BUILT", False)
    message = "its kernels for the CPU are not built: python -m catimage_accel.kernels.cpu"
    with pytest.raises(EngineUnavailable, match=message):
        FusedEngine(tiny_sd_folder)
    assert FusedEngine.why_not(torch.device("meta")) == (
        "its kernels need a CUDA device or a CPU, and the device is meta; use 'eager'"
    )
    engines = LoadedEngines(torch.device("cpu"), engine_cache, fall_back=False)
    with pytest.raises(EngineUnavailable, match=message):
        engines.get(tiny_sd_folder, engines=("fused",))
    with pytest.raises(ValueError, match="precision is 'int8' with engine 'fused'; accepted: fp32, bf16, fp16"):
        engines.get(tiny_sd_folder, engines=("fused",), precision="int8")


@needs_kernels
def test_shared_parts_stay_as_they_are(tiny_sd_folder: Path) -> None:
    """Other engines of the folder use them."""
    eager = EagerEngine(tiny_sd_folder)
    FusedEngine(tiny_sd_folder, shared=eager.shared)
    parts: list[Any] = [eager.unet, eager.shared.vae(), *eager.shared.text.encoders]
    classes = {type(module) for part in parts for module in part.modules()}
    assert not any(kind.__module__.startswith("catimage_accel.accelerate") for kind in classes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_eager_engines_results_on_a_device(precision: str, tiny_sd_folder: Path) -> None:
    exact = denoised(EagerEngine(tiny_sd_folder)).cuda()
    rounded = denoised(EagerEngine(tiny_sd_folder, precision=precision, device="cuda"))
    ours = denoised(FusedEngine(tiny_sd_folder, precision=precision, device="cuda"))
    assert (ours.cuda() - exact).norm() <= 1.25 * (rounded.cuda() - exact).norm() + 1e-5 * exact.norm()
