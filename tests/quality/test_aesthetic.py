"""AestheticScore with heads of the two published shapes on a small random CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from catimage_accel.quality import AestheticScore, CLIPScore, Metric

PROMPTS = [""] * 4


class Published(nn.Module):
    """The shape of improved-aesthetic-predictor's head, narrower."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 12), nn.Dropout(0.2), nn.Linear(12, 8), nn.Dropout(0.2), nn.Linear(8, 6), nn.Dropout(0.1),
            nn.Linear(6, 4), nn.Linear(4, 1),
        )  # fmt: skip

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.layers(embeddings)


@pytest.fixture(scope="module")
def judge(clip_folder: Path) -> CLIPScore:
    return CLIPScore(clip_folder)


def saved(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "head", [pytest.param(nn.Linear(16, 1), id="one-linear"), pytest.param(Published().eval(), id="five-with-dropouts")]
)
def test_score_is_the_heads_own(
    head: nn.Module, suffix: str, judge: CLIPScore, clip_folder: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    path = saved(head.state_dict(), tmp_path / f"head.{suffix}")
    metric: Metric = AestheticScore(path, clip_folder, batch_size=3)
    with torch.no_grad():
        expected = head(torch.from_numpy(judge.embed_images(images)).float())[:, 0].numpy()
    scores = metric.score(images, PROMPTS)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 1e-5
    assert scores.dtype == np.float64
    np.testing.assert_allclose(AestheticScore(path, judge).score(images, ["a dog"] * 4), scores, atol=1e-6)
    assert (metric.name, metric.higher_is_better) == ("aesthetic", True)
    other = saved({name: 2 * tensor for name, tensor in head.state_dict().items()}, tmp_path / f"other.{suffix}")
    assert AestheticScore(other, judge).digest != AestheticScore(path, judge).digest
    assert metric.score([], []).shape == (0,)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        pytest.param(nn.Linear(768, 1).state_dict(), "takes embeddings of length 768.* have 16", id="another-clip"),
        pytest.param(nn.Linear(16, 2).state_dict(), "gives 2 numbers an image", id="two-outputs"),
        pytest.param({"weight": torch.zeros(16), "bias": torch.zeros(1)}, r"weight has shape \(16,\)", id="a-vector"),
        pytest.param({"weight": torch.zeros(1, 16)}, "has weight; accepted", id="no-bias"),
        pytest.param(
            {f"layers.{i}.{part}": torch.zeros(1) for i in (0, 3, 6) for part in ("weight", "bias")},
            "layers.0.bias, .*accepted", id="layers-with-activations-between-them",
        ),
        pytest.param(
            Published().state_dict() | {"layers.4.weight": torch.zeros(6, 9)},
            r"layers.4.weight has shape \(6, 9\).*\(out, 8\)", id="layers-that-do-not-join",
        ),
        pytest.param([torch.zeros(1)], "holds a list; accepted: tensors by name", id="no-state-dict"),
        pytest.param(nn.Linear(16, 1), "could not be read as tensors alone", id="a-pickled-module"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_named(state: Any, text: str, judge: CLIPScore, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=text) as raised:
        AestheticScore(path, judge)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth"])
def test_a_broken_file_is_named(name: str, judge: CLIPScore, tmp_path: Path) -> None:
    path = saved(nn.Linear(16, 1).state_dict(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{name} could not be read as tensors alone"):
        AestheticScore(path, judge)


def test_wrong_input_is_named(judge: CLIPScore, images: list[Image.Image], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an aesthetic predictor's head"):
        AestheticScore(tmp_path / "head.pth", judge)
    (tmp_path / "head.ckpt").touch()
    with pytest.raises(ValueError, match=r"head\.ckpt; accepted: a file \.safetensors"):
        AestheticScore(tmp_path / "head.ckpt", judge)
    path = saved(nn.Linear(16, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="4 images with 3 prompts"):
        AestheticScore(path, judge).score(images, PROMPTS[:3])
    with pytest.raises(FileNotFoundError, match="no folder"):
        AestheticScore(path, tmp_path / "nowhere")
