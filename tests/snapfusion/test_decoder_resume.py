"""A decoder's training that was stopped goes on, and with nothing but what it was begun with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from catimage_accel.snapfusion.decoder import distill_decoder
from catimage_accel.snapfusion.pruning import pruned_decoder
from catimage_accel.training.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=4, batch_size=2, learning_rate=1e-3, warmup=1, precision="fp32", validate_every=2)


@pytest.fixture
def vae(sd15_shaped: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(sd15_shaped, subfolder="vae").eval()


def trained(vae: AutoencoderKL, folder: Path, config: TrainConfig = CONFIG, keep: float = 0.5) -> dict[str, Any]:
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    student = distill_decoder(vae, pruned_decoder(vae, keep), latents, config, folder, CPU, {"keep": keep})
    return student.state_dict()


def test_stopped_it_ends_as_if_it_had_not_been(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(vae, tmp_path / "whole")
    calls = []

    def l1_loss(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return l1(*given)

    l1 = F.l1_loss
    monkeypatch.setattr(F, "l1_loss", l1_loss)
    with pytest.raises(KeyboardInterrupt):
        trained(vae, tmp_path / "cut")
    resumed = trained(vae, tmp_path / "cut")
    assert len(calls) == 5, "two steps, the third that was stopped, and two more"
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("change", "keep", "told"),
    [
        pytest.param({"learning_rate": 2e-3}, 0.5, r"learning_rate = 0\.001, this run has 0\.002", id="another rate"),
        pytest.param({}, 1.0, r"keep = 0\.5, this run has 1\.0", id="another share of the channels"),
    ],
)
def test_another_run_does_not_go_on_from_it(
    vae: AutoencoderKL, tmp_path: Path, change: dict[str, Any], keep: float, told: str
) -> None:
    trained(vae, tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=told):
        trained(vae, tmp_path, dataclasses.replace(CONFIG, **change), keep)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
