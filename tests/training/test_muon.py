"""Muon in float32 steps as torch's would if it did not round to bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch

from catimage_accel.training import loop
from catimage_accel.training.muon import Float32Muon, orthogonal

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SHAPES = ((6, 20), (20, 6), (9, 9), (1, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square", "one row"])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrix, COEFFICIENTS, 5, 1e-7)
    assert made.shape == matrix.shape
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(made.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_nothing_comes_of_no_gradient() -> None:
    zero, without = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    zero.grad = torch.zeros(3, 4)
    Float32Muon([zero, without], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(zero, torch.ones(3, 4))
    assert torch.equal(without, torch.ones(3, 4))


def test_steps_as_torchs_and_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # what torch's iteration rounds by
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.05, "weight_decay": 0.1}
    one = Float32Muon(ours, **options)
    other = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(6):
        before = [matrix.detach().clone() for matrix in theirs]
        for mine, its in zip(ours, theirs, strict=True):
            mine.data.copy_(its.data)
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        if step == 3:
            one.load_state_dict(copy.deepcopy(other.state_dict()))
        one.step()
        other.step()
        for mine, its, was in zip(ours, theirs, before, strict=True):
            moved = (its - was).norm()
            assert moved > 0
            assert (mine - its).norm() < 1e-4 * moved


@pytest.mark.parametrize(("arithmetic", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_a_trainer_takes_the_one_that_its_device_computes(
    arithmetic: bool, kind: type, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "computes_in_bf16", lambda device: arithmetic)
    config = loop.TrainConfig(steps=1, batch_size=1, learning_rate=0.1, precision="fp32")
    trainer = loop.Trainer(torch.nn.Linear(3, 2), config, tmp_path, torch.device("cpu"), "one")
    assert [type(one) for one in trainer.optimizers] == [torch.optim.AdamW, kind]
