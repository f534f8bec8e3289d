"""Kernel ridge regression: every prompt's quality with every candidate from how alike prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from catimage_accel.routing.embedders import Embedder, NGramEmbedder, relocatable, with_counts
from catimage_accel.routing.features import Points, PromptFeatures
from catimage_accel.routing.routers import FittedRouter
from catimage_accel.routing.storage import SavedRouter
from catimage_accel.routing.table import ScoreTable, check_prompts

MAX_LANDMARKS = 1500  # prompts that others are compared with
WIDTHS = (0.55, 0.8, 1.1, 1.6)  # of the kernel, tried; prompts lie about 1.4 apart
RIDGES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, np.inf)  # tried
RANK_TOLERANCE = 1e-9
ROWS_AT_ONCE = 256


class KernelRouter(FittedRouter):
    """Kernel ridge regression with a Gaussian kernel; the mean of a Gaussian process (Rasmussen and Williams 2006).

    The training scores, less each candidate's mean, are split into their principal components: what all candidates
    share (a prompt's difficulty) is mostly the first, what tells them apart the others. Each component gets a ridge of
    its own, which may be infinite, and all one width of the kernel, by the least squared error of leaving every
    training prompt out. So a prediction goes back to the candidates' means where the text says little, and for prompts
    unlike any seen. ``embedder`` is by default n-grams, counts and wording, which need no weights. Above
    ``MAX_LANDMARKS`` prompts are compared with that many of them (the Nystrom method).

    Attributes, once fitted: ``width`` of the kernel, in units in which the mean square length of a prompt's vector
    is 1; ``ridges``, one for each component.
    """

    KIND = "kernel"

    def __init__(self, embedder: Embedder | None = None) -> None:
        self.embedder: Embedder = embedder or with_counts(NGramEmbedder())

    def fit(self, table: ScoreTable) -> Self:
        # The order of the table's rows plays no part.
        order = sorted(range(len(table)), key=lambda row: table.prompts[row])
        self._features, vectors = PromptFeatures.fit(self.embedder, [table.prompts[row] for row in order])
        spread = np.linspace(0, len(order) - 1, min(len(order), MAX_LANDMARKS)).round().astype(int)
        self._candidates, self._landmarks = table.candidates, Points(vectors[spread])
        scores = table.scores[order]
        self._mean = scores.mean(axis=0)
        _, _, directions = np.linalg.svd(scores - self._mean, full_matrices=False)
        components = (scores - self._mean) @ directions.T
        distances = self._distances(vectors)
        fits = [_Fit.of(_kernel(distances, width), spread, components) for width in WIDTHS]
        best = min(range(len(fits)), key=lambda i: fits[i].error)
        self.width, self.ridges = WIDTHS[best], fits[best].ridges
        self._weights = fits[best].weights @ directions
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        import torch

        self.require_fitted()
        check_prompts(prompts)
        quality = np.tile(self._mean, (len(prompts), 1))
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            alike = _kernel(self._distances(self._features(prompts[start : start + ROWS_AT_ONCE])), self.width)
            quality[start : start + len(alike)] += (torch.from_numpy(alike) @ torch.from_numpy(self._weights)).numpy()
        return quality

    def save(self, folder: str | Path) -> None:
        names, folder = self.require_fitted(), Path(folder)
        settings = {
            "width": self.width,
            "ridges": [ridge if np.isfinite(ridge) else None for ridge in self.ridges],
            "embedder": relocatable(self.embedder.describe(), folder),
        }
        tensors = {
            "landmarks": self._landmarks.vectors.astype(np.float32),
            "weights": self._weights,
            "mean": self._mean,
            **self._features.tensors(),
        }
        SavedRouter(self.KIND, names, settings, tensors, folder).write()

    @classmethod
    def restore(cls, saved: SavedRouter, embedder: Embedder | None = None) -> Self:
        """Read a saved router; ValueError when ``embedder`` is not the one that it was fitted with."""
        features = PromptFeatures.restore(saved, embedder)
        router = cls(features.embedder)
        router._features, router._candidates = features, saved.candidates
        router.width = float(saved.settings["width"])
        router.ridges = [np.inf if ridge is None else float(ridge) for ridge in saved.settings["ridges"]]
        router._landmarks = Points(saved.tensor("landmarks", (None, features.columns)))
        router._weights = saved.tensor("weights", (len(router._landmarks.vectors), len(saved.candidates)))
        router._mean = saved.tensor("mean", (len(saved.candidates),))
        return router

    def _distances(self, vectors: np.ndarray) -> np.ndarray:
        """(n, landmarks), squared, in units in which a training prompt's vector has a mean square length of 1."""
        return np.maximum(self._landmarks.squared_distances(vectors), 0) / len(self.embedder.blocks)


def _kernel(distances: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-distances / (2 * width**2))


class _Fit:
    """Ridge regression of some columns in the features that a kernel stands for, and its error of leaving one out."""

    def __init__(self, weights: np.ndarray, ridges: list[float], error: float) -> None:
        self.weights, self.ridges, self.error = weights, ridges, error

    @classmethod
    def of(cls, alike: np.ndarray, landmarks: np.ndarray, targets: np.ndarray) -> _Fit:
        """``alike`` is (n, landmarks), ``landmarks`` their rows in it, ``targets`` (n, columns)."""
        values, vectors = np.linalg.eigh(alike[landmarks])
        kept = values > RANK_TOLERANCE * values[-1]
        whiten = vectors[:, kept] / np.sqrt(values[kept])
        strengths, basis = values[kept], vectors[:, kept] * np.sqrt(values[kept])
        if len(landmarks) < len(alike):
            strengths, turns = np.linalg.eigh((alike @ whiten).T @ (alike @ whiten))
            strengths, whiten = np.maximum(strengths, 0), whiten @ turns
            basis = alike @ whiten
        products = basis.T @ targets
        errors, damped = [], []
        for ridge in RIDGES:
            damping = np.zeros_like(strengths) if np.isinf(ridge) else 1 / (strengths + ridge)
            left = 1 - (basis**2) @ damping  # of a prompt's own score in its prediction
            errors.append((((targets - basis @ (damping[:, None] * products)) / left[:, None]) ** 2).sum(axis=0))
            damped.append(damping)
        chosen = np.argmin(errors, axis=0)
        weights = np.stack([damped[i] * products[:, column] for column, i in enumerate(chosen)], axis=1)
        return cls(whiten @ weights, [RIDGES[i] for i in chosen], float(np.min(errors, axis=0).sum()))
