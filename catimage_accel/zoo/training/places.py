"""What a caption's nouns have to do with its picture: their tokens, and where their objects are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPTokenizer

from catimage_accel.zoo.objects import NOUNS, plural
from catimage_accel.zoo.scenes import DIRECTIONS, IMAGE_SIZE, Scene


def noun_places(picture: Scene) -> np.ndarray:
    """(len(NOUNS), 2): where each noun's objects are on average, x and y from -1 to 1; NaN for an absent noun."""
    places = np.full((len(NOUNS), 2), np.nan, np.float32)
    for noun, _ in picture.spec.groups:
        centres = [(placed.x, placed.y) for placed in picture.objects if placed.noun == noun]
        places[NOUNS.index(noun)] = np.mean(centres, axis=0) / (IMAGE_SIZE / 2) - 1
    return places


def noun_of_token(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """For every token id the index of the noun, singular or plural, that the token spells, or -1; int64."""
    nouns = torch.full((len(tokenizer),), -1)
    for index, noun in enumerate(NOUNS):
        for word in (noun, plural(noun)):
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) == 1:
                nouns[ids[0]] = index
    return nouns


class PlaceLoss:
    """How far the places read from nouns' tokens are from where the objects are, in captions that tell directions.

    Only "left of", "right of", "above" and "below" count: elsewhere a caption leaves its objects' places open.
    """

    def __init__(self, layouts: Sequence[Scene], tokenizer: CLIPTokenizer):
        self.places = torch.from_numpy(np.stack([noun_places(layout) for layout in layouts]))
        self.directed = torch.tensor([layout.spec.relation in DIRECTIONS for layout in layouts])
        self.nouns = noun_of_token(tokenizer)

    def __call__(self, guess: torch.Tensor, input_ids: torch.Tensor, scenes: torch.Tensor) -> torch.Tensor:
        """Smooth L1 loss (a scalar, 0 where no caption tells a direction) of ``guess`` (batch, tokens, 2).

        ``input_ids`` (batch, tokens) and ``scenes`` (batch,), the layouts' indices, are on the CPU.
        """
        nouns = self.nouns[input_ids]
        counted = (nouns >= 0) & self.directed[scenes, None]
        if not counted.any():
            return guess.new_zeros(())
        where = self.places[scenes[:, None].expand_as(input_ids)[counted], nouns[counted]]
        return F.smooth_l1_loss(guess[counted.to(guess.device)].float(), where.to(guess.device), beta=0.1)
