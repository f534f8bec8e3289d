"""Sharpness: how much fine detail an image has, whatever it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from catimage_accel.quality.metric import check_pairs, to_rgb

if TYPE_CHECKING:
    from catimage_accel.quality.metric import ImageLike

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Sharpness:
    """Variance of the Laplacian of the luma (0 to 255), in squared grey levels; higher is sharper, 0 is flat.

    The focus measure of Pech-Pacheco et al. (ICPR 2000): four-neighbour kernel, borders mirrored without the
    edge itself, as OpenCV's ``Laplacian(...).var()``. Noise counts as sharpness, and values compare only between
    images of one size. Images need 2 pixels each way. The prompts play no part.
    """

    name = "sharpness"
    higher_is_better = True
    range = (0.0, math.inf)

    def score(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> np.ndarray:
        """(n,) float64, >= 0; ValueError for unlike lengths, something that is no image, or one that is too small."""
        check_pairs(images, prompts)
        return np.array([_laplacian_variance(array, i) for i, array in enumerate(to_rgb(images))], dtype=np.float64)


def _laplacian_variance(image: np.ndarray, position: int) -> float:
    if min(image.shape[:2]) < 2:
        raise ValueError(f"image {position} has {image.shape[1]}x{image.shape[0]} pixels, expected at least 2x2")
    grey = np.pad(image @ LUMA, 1, mode="reflect")
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((neighbours - 4 * grey[1:-1, 1:-1]).var())
