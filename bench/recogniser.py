"""A small convolutional network that tells which nouns are in a picture, trained on rendered scenes alone.

It is there to check the judge's scores by something that has no part in them: no text, another architecture, another
loss, other random numbers. It knows nothing of numbers, places and backgrounds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.zoo.objects import NOUNS
from catimage_accel.zoo.scenes import SceneSpec
from catimage_accel.zoo.training.autoencoder import to_pixels
from catimage_accel.zoo.training.data import rendered, spec

WIDTHS = (32, 64, 128)
DISTRACTORS = 15
MOST_NOISE = 0.06
DEFAULTS = TrainConfig(
    steps=1300, batch_size=96, learning_rate=3e-3, warmup=50, decay_share=0.5, ema_decay=0.99, seed=4111,
    checkpoint_every=100,
)  # fmt: skip


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, out)
        same = width == out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.skip(x))


class Recogniser(nn.Module):
    """Pixels (n, 3, 64, 64) in [-1, 1] to logits (n, nouns): a noun's soft maximum over 8 x 8 places."""

    def __init__(self) -> None:
        super().__init__()
        low, middle, high = WIDTHS
        self.body = nn.Sequential(
            nn.Conv2d(3, low, 4, 2, 1, bias=False), nn.GroupNorm(8, low), nn.ReLU(),
            _Block(low, middle, 2), _Block(middle, middle), _Block(middle, high, 2), _Block(high, high),
        )  # fmt: skip
        self.head = nn.Conv2d(high, len(NOUNS), 1)
        # At the start every noun is as unlikely as it is rare: its 64 places sum to about -4.
        nn.init.constant_(self.head.bias, -8.0)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels)).float().flatten(2).logsumexp(2)


def noun_labels(specs: Sequence[SceneSpec]) -> np.ndarray:
    """(n, nouns) bool: which nouns a meaning names."""
    index = {noun: i for i, noun in enumerate(NOUNS)}
    labels = np.zeros((len(specs), len(NOUNS)), bool)
    for row, said in zip(labels, specs, strict=True):
        row[[index[noun] for noun, _ in said.groups]] = True
    return labels


def train_recogniser(folder: Path, scenes_cache: Path, scenes: int, config: TrainConfig = DEFAULTS) -> Recogniser:
    """Trains on the first ``scenes`` of the split "train", or goes on, in ``folder``; the averaged model in float32."""
    torch.manual_seed(config.seed)
    model = Recogniser()
    device = torch.device("cpu")
    trainer = Trainer(model, config, folder, device, "recogniser")
    if trainer.step < config.steps:
        pictures = rendered(scenes, "train", scenes_cache)
        labels = torch.from_numpy(noun_labels([spec(index, "train") for index in range(scenes)])).float()

        def loss_fn(step: int, generator: torch.Generator) -> Tensor:
            index = torch.randint(scenes, (config.batch_size,), generator=generator)
            pixels = _varied(to_pixels(pictures[index.numpy()], device), generator)
            losses = F.binary_cross_entropy_with_logits(model(pixels), labels[index], reduction="none")
            return losses.sum(1).mean()

        trainer.run(loss_fn)
    model.float()
    model.load_state_dict(trainer.ema_state())
    return model.eval()


def _varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them mirrored, all a little blurred and noisy: drawn pictures are softer than rendered ones."""
    n = len(pixels)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    blur = torch.rand(n, 1, 1, 1, generator=generator).to(pixels.dtype)
    pixels = torch.lerp(pixels, F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), blur)
    noise = torch.randn(pixels.shape, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator) * MOST_NOISE
    return pixels + noise.to(pixels.dtype)


@torch.inference_mode()
def logits(model: Recogniser, pictures: np.ndarray, batch: int = 100) -> np.ndarray:
    """(n, nouns) of uint8 (n, 64, 64, 3)."""
    parts = [
        model(to_pixels(pictures[start : start + batch], torch.device("cpu")).float())
        for start in range(0, len(pictures), batch)
    ]
    return torch.cat(parts).numpy()


def distractors(said: SceneSpec, prompt: str) -> list[int]:
    """Indices of ``DISTRACTORS`` nouns that ``said`` does not name, always the same ones for a prompt."""
    absent = np.flatnonzero(~noun_labels([said])[0])
    rng = np.random.default_rng((15, zlib.crc32(prompt.encode())))
    return rng.choice(absent, DISTRACTORS, replace=False).tolist()


def found(values: np.ndarray, specs: Sequence[SceneSpec], prompts: Sequence[str]) -> np.ndarray:
    """(n,) of the pictures' logits: the share of the nouns named that rank above all of the prompt's distractors."""
    shares = []
    for row, said, prompt in zip(values, specs, prompts, strict=True):
        named = row[noun_labels([said])[0]]
        shares.append((named > row[distractors(said, prompt)].max()).mean())
    return np.array(shares)


def sureness(values: np.ndarray, specs: Sequence[SceneSpec]) -> np.ndarray:
    """(n,): the mean sigmoid of the nouns named."""
    sure = 1 / (1 + np.exp(-values.astype(np.float64)))
    labels = noun_labels(specs)
    return (sure * labels).sum(1) / labels.sum(1)


def mean_average_precision(values: np.ndarray, labels: np.ndarray) -> float:
    """Over the nouns that occur."""
    precisions = []
    for scores, truth in zip(values.T, labels.T, strict=True):
        if truth.any():
            hits = truth[np.argsort(-scores, kind="stable")]
            precisions.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(precisions))
