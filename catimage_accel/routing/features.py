"""An embedder's vectors as routers compare them: every block of columns centred, evened out and weighed alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from catimage_accel.routing.embedders import Embedder, embedder_from
from catimage_accel.routing.storage import SavedRouter

PROBE = "Three red apples, a dog and no cat to the left of a house"
PROBE_TOLERANCE = 0.05  # relative; half precision moves an embedding by a tenth of this


class PromptFeatures:
    """Prompts to (n, columns) float64 vectors, of mean square length 1 a block over the prompts it was fitted on.

    A column is divided by its deviation, damped for rare columns. What is fitted goes through float32, as it is saved,
    so that a loaded router predicts the same.
    """

    def __init__(self, embedder: Embedder, centre: np.ndarray, scale: np.ndarray) -> None:
        self.embedder, self._centre, self._scale = embedder, centre, scale

    @property
    def columns(self) -> int:
        return len(self._centre)

    @classmethod
    def fit(cls, embedder: Embedder, prompts: Sequence[str]) -> tuple[Self, np.ndarray]:
        """The features, and the vectors of ``prompts``."""
        embedded = embedder.embed(prompts).astype(np.float64)
        centre, scale = (_through_float32(part) for part in _standardisation(embedded, embedder.blocks))
        return cls(embedder, centre, scale), _through_float32((embedded - centre) * scale)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = (self.embedder.embed(prompts) - self._centre) * self._scale
        return vectors

    def tensors(self) -> dict[str, np.ndarray]:
        """What is saved: ``centre``, ``scale``, and the vector of a prompt by which the embedder is known again."""
        probe = self.embedder.embed([PROBE])[0].astype(np.float32)
        return {"centre": self._centre.astype(np.float32), "scale": self._scale.astype(np.float32), "probe": probe}

    @classmethod
    def restore(cls, saved: SavedRouter, embedder: Embedder | None) -> Self:
        """Reads ``tensors()``; ValueError when ``embedder`` (or the one that is named) gives other vectors."""
        embedder = embedder or embedder_from(saved.settings["embedder"], saved.folder)
        probe, found = saved.tensor("probe", (None,)), embedder.embed([PROBE])[0]
        if found.shape != probe.shape or np.linalg.norm(found - probe) > PROBE_TOLERANCE * np.linalg.norm(probe):
            raise ValueError(
                f"the router in {saved.folder} was fitted with the embedder {saved.settings['embedder']}, whose "
                f"vectors differ from those of {embedder.describe()}; fit it again"
            )
        return cls(embedder, *(saved.tensor(name, (len(probe),)) for name in ("centre", "scale")))


class Points:
    """Vectors (n, columns) that others are compared with."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self._lengths = (vectors**2).sum(axis=1)

    def squared_distances(self, vectors: np.ndarray) -> np.ndarray:
        """(m, n) from ``vectors`` (m, columns); rounding may leave some a little below 0."""
        import torch

        # By torch: NumPy's own threads would wait for those of a text encoder, twice as long as that takes.
        products = (torch.from_numpy(vectors) @ torch.from_numpy(self.vectors).T).numpy()
        squares: np.ndarray = self._lengths[None, :] - 2 * products + (vectors**2).sum(axis=1, keepdims=True)
        return squares


def _through_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).astype(np.float64)


def _standardisation(embedded: np.ndarray, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(columns,) centre and scale after which every block's vectors have a mean square length of 1."""
    if sum(blocks) != embedded.shape[1]:
        raise ValueError(f"the embedder gave {embedded.shape[1]} columns, but its blocks are {tuple(blocks)}")
    centre, variance = embedded.mean(axis=0), embedded.var(axis=0)
    scale = np.zeros_like(centre)
    for part in np.split(np.arange(len(centre)), np.cumsum(blocks)[:-1]):
        damped = variance[part] + variance[part].mean()
        if damped.min(initial=np.inf) > 0:
            scale[part] = 1 / np.sqrt(damped * (variance[part] / damped).sum())
    return centre, scale
