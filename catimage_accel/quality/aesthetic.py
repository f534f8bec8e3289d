"""AestheticScore: how much people like the look of an image, by LAION's predictors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catimage_accel.quality.clip_score import CLIPScore
from catimage_accel.quality.metric import check_pairs
from catimage_accel.quality.sources import digest, read_tensors

if TYPE_CHECKING:
    import torch

    from catimage_accel.quality.metric import ImageLike

# Positions of the Linear layers among Linear and Dropout in improved-aesthetic-predictor's "linearMSE" files.
MLP_LAYERS = (0, 2, 4, 6, 7)


class AestheticScore:
    """A rating predicted from an image alone: people's from 1 to 10, but not bounded to that; higher is better.

    ``head`` is a file of LAION-AI/aesthetic-predictor (one Linear: ``weight``, ``bias``) or of
    christophschuhmann/improved-aesthetic-predictor (five Linears without activations, ``layers.0`` to ``layers.7``:
    sac+logos+ava1-l14-linearMSE.pth), as .safetensors, or as .pth read without running what is in it. ``clip`` is
    the CLIP that the head was trained on (for both named files ViT-L/14): a transformers folder, a hub id that is then
    downloaded, or a :class:`CLIPScore` to share. Embeddings are scaled to length 1. The prompts play no part. Not
    measured yet with the published weights. FileNotFoundError without the file or folder, ValueError for a head of
    another shape.
    """

    name = "aesthetic"
    higher_is_better = True
    range = (-math.inf, math.inf)

    def __init__(
        self,
        head: str | Path,
        clip: str | Path | CLIPScore,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> None:
        self._head = Path(head)
        layers = _read_head(self._head)
        self._clip = clip if isinstance(clip, CLIPScore) else CLIPScore(clip, device=device, batch_size=batch_size)
        takes = layers[0][0].shape[1]
        if takes != self._clip.dimensions:
            raise ValueError(
                f"head {head} takes embeddings of length {takes}, but those of clip have {self._clip.dimensions}; "
                f"accepted: the CLIP that the head was trained on"
            )
        # Layers without an activation between them are one affine map.
        self._weight, self._bias = layers[0]
        for weight, bias in layers[1:]:
            self._weight, self._bias = weight @ self._weight, weight @ self._bias + bias

    @cached_property
    def digest(self) -> str:
        """The sha256 of head and CLIP."""
        return f"{digest([self._head])}+{self._clip.digest}"

    def score(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> np.ndarray:
        """(n,) float64, about 1 to 10; ValueError for unlike lengths or something that is no image."""
        check_pairs(images, prompts)
        return (self._clip.embed_images(images) @ self._weight.T + self._bias)[:, 0]


def _read_head(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The layers' weights (out, in) and biases (out,) in float64, in the order in which they are applied."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, expected an aesthetic predictor's head as .safetensors or .pth")
    tensors = read_tensors(path)
    prefixes = ("",) if "weight" in tensors else tuple(f"layers.{number}." for number in MLP_LAYERS)
    if set(tensors) != {prefix + part for prefix in prefixes for part in ("weight", "bias")}:
        raise ValueError(
            f"head {path} has {', '.join(sorted(tensors))}; accepted: weight and bias of one Linear, or of the Linears "
            f"{', '.join(f'layers.{number}' for number in MLP_LAYERS)}"
        )
    layers = [
        (tensors[f"{prefix}weight"].double().numpy(), tensors[f"{prefix}bias"].double().numpy()) for prefix in prefixes
    ]
    width = layers[0][0].shape[-1]
    for (weight, bias), prefix in zip(layers, prefixes, strict=True):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"head {path}: {prefix}weight has shape {weight.shape} and {prefix}bias {bias.shape}; accepted: "
                f"(out, {width}) and (out,)"
            )
        width = weight.shape[0]
    if width != 1:
        raise ValueError(f"head {path} gives {width} numbers an image; accepted: 1")
    return layers
