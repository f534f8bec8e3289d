"""What compares two sets of images: the protocol, and the features of both sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from catimage_accel.quality.metric import ImageLike


class ImageEmbedder(Protocol):
    """``embed_images`` gives (n, dimensions) floats, as :class:`CLIPScore`'s does."""

    def embed_images(self, images: Sequence[ImageLike]) -> np.ndarray: ...


class SetMetric(Protocol):
    """A number for how far a set of images lies from a set of references; prompts and pairing play no part.

    ``compare`` is symmetric and takes at least 2 images a set, of any sizes and in any number; fewer are a ValueError,
    as is what is no image. Values compare only under one embedder.
    """

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def compare(self, images: Sequence[ImageLike], references: Sequence[ImageLike]) -> float: ...


def embed_sets(
    embedder: ImageEmbedder, images: Sequence[ImageLike], references: Sequence[ImageLike]
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets' features, float64 (n, dimensions) each; ValueError for a set of fewer than 2 images."""
    for name, given in (("images", images), ("references", references)):
        if len(given) < 2:
            raise ValueError(f"{name} has {len(given)} image{'s' * (len(given) != 1)}, expected at least 2")
    ours, theirs = (np.asarray(embedder.embed_images(given), dtype=np.float64) for given in (images, references))
    return ours, theirs
