"""FID: the Frechet distance between two sets of images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from catimage_accel.quality.sets import ImageEmbedder, embed_sets

if TYPE_CHECKING:
    from catimage_accel.quality.metric import ImageLike


class FID:
    """Squared Frechet distance between Gaussians fitted to two sets' features; in [0, inf), 0 is the same, no unit.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of Heusel et al. (arXiv 1706.08500), covariances over n - 1. The
    features are ``embedder``'s, for a :class:`CLIPScore` image embeddings of length 1, so values are no FID of
    Inception features and compare only under one embedder. Biased upwards for small sets: the fewer images, the
    larger; compare only sets of one size. With fewer images than dimensions it warns so, once. In float64.
    """

    name = "fid"
    higher_is_better = False
    range = (0.0, math.inf)

    def __init__(self, embedder: ImageEmbedder) -> None:
        self.embedder = embedder
        self._warned = False

    def compare(self, images: Sequence[ImageLike], references: Sequence[ImageLike]) -> float:
        """The distance, >= 0; ValueError for fewer than 2 images a set."""
        ours, theirs = embed_sets(self.embedder, images, references)
        fewest, dimensions = min(len(ours), len(theirs)), ours.shape[1]
        if fewest < dimensions and not self._warned:
            self._warned = True
            warnings.warn(
                f"FID of {fewest} images with {dimensions} dimensions is far too high: the covariance needs more "
                f"images than dimensions. CMMD does not.",
                stacklevel=2,
            )
        return frechet_distance(ours, theirs)


def frechet_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The squared Frechet distance, >= 0, of two sets of features, float64 (n, dimensions) each, n at least 2."""
    means = ours.mean(axis=0), theirs.mean(axis=0)
    roots = [
        (features - mean) / math.sqrt(len(features) - 1) for features, mean in zip((ours, theirs), means, strict=True)
    ]
    # S = R'R for either set, so the eigenvalues of S1 S2 are the squared singular values of R1 R2': no covariance
    # is formed and no root of a tiny eigenvalue taken. Triangular R are no larger than the covariances.
    left, right = (np.asarray(np.linalg.qr(root, mode="r")) for root in roots)
    common = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    spread = sum(float((root**2).sum()) for root in roots)
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + spread - 2 * common))
