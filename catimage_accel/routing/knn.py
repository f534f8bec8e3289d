"""Nearest-neighbour routing, with difficulty and gaps predicted apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from catimage_accel.routing.counts import CountFeatures
from catimage_accel.routing.embedders import Embedder, JointEmbedder, NGramEmbedder, relocatable
from catimage_accel.routing.features import Points, PromptFeatures
from catimage_accel.routing.routers import FittedRouter
from catimage_accel.routing.storage import SavedRouter
from catimage_accel.routing.table import ScoreTable, check_prompts

TRIED_K = (5, 10, 20, 30, 50, 80, 120, 200, 300)
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Smoothing:
    """How a part of the scores is predicted: over ``k`` neighbours, then ``shrinkage`` of the way to its mean."""

    k: int
    shrinkage: float


class KNNRouter(FittedRouter):
    """Predicts the mean scores of the ``k`` most similar training prompts, drawn towards the mean of all of them.

    A score is split in two: the prompt's *difficulty* (the mean over candidates, against the average prompt's) and
    the candidates' *gaps* to it. Only gaps decide a route, but difficulty varies more and would decide ``k`` for
    both; so each part has its own ``Smoothing`` (``difficulty``, ``gaps`` once fitted). A part's prediction is ``(1 -
    shrinkage) * mean over k neighbours``.

    ``k`` (1 or more) and ``shrinkage`` (0 to 1) hold for both parts; "auto" chooses them for each by the squared
    error of predicting every training prompt from the others. ``embedder`` is by default n-grams and counts, which
    need no weights. Every block of its columns is centred, divided column by column by its deviation (damped for rare
    columns) and weighed alike; distance is Euclidean. ``fit`` raises ValueError when ``k`` exceeds the number of
    prompts, or when something is "auto" and there are fewer than 2.
    """

    KIND = "knn"

    def __init__(
        self,
        embedder: Embedder | None = None,
        k: int | Literal["auto"] = "auto",
        shrinkage: float | Literal["auto"] = "auto",
    ) -> None:
        if k != "auto" and not (isinstance(k, int) and k >= 1):
            raise ValueError(f'k is {k!r}, expected an integer >= 1 or "auto"')
        if shrinkage != "auto" and not (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1):
            raise ValueError(f'shrinkage is {shrinkage!r}, expected a number from 0 to 1 or "auto"')
        self.embedder: Embedder = embedder or JointEmbedder(NGramEmbedder(), CountFeatures())
        self.k, self.shrinkage = k, shrinkage

    def fit(self, table: ScoreTable) -> Self:
        if self.k != "auto" and self.k > len(table):
            raise ValueError(f"k is {self.k}, but the table has {len(table)} prompts; expected k of at most that")
        if "auto" in (self.k, self.shrinkage) and len(table) < 2:
            raise ValueError(f'a table of {len(table)} prompt, expected 2 or more to choose k or shrinkage ("auto")')
        # Equally near prompts are taken in this order, so that the order of the table's rows plays no part.
        order = sorted(range(len(table)), key=lambda row: table.prompts[row])
        self._features, self._vectors = PromptFeatures.fit(self.embedder, [table.prompts[row] for row in order])
        self._candidates, self._scores = table.candidates, table.scores[order]
        self._prepare()
        self.difficulty, self.gaps = self._smoothings()
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        self.require_fitted()
        check_prompts(prompts)
        quality = np.tile(self._mean, (len(prompts), 1))
        most = max(self.difficulty.k, self.gaps.k)
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            near = self._nearest(self._features(prompts[start : start + ROWS_AT_ONCE]))[:, :most]
            rows = slice(start, start + len(near))
            for smoothing, part in ((self.difficulty, self._difficulty), (self.gaps, self._gaps)):
                quality[rows] += (1 - smoothing.shrinkage) * part[near[:, : smoothing.k]].mean(axis=1)
        return quality

    def save(self, folder: str | Path) -> None:
        names, folder = self.require_fitted(), Path(folder)
        settings = {
            "k": self.k,
            "shrinkage": self.shrinkage,
            "difficulty": asdict(self.difficulty),
            "gaps": asdict(self.gaps),
            "embedder": relocatable(self.embedder.describe(), folder),
        }
        tensors = {
            "vectors": self._vectors.astype(np.float32),
            "scores": self._scores,
            **self._features.tensors(),
        }
        SavedRouter(self.KIND, names, settings, tensors, folder).write()

    @classmethod
    def restore(cls, saved: SavedRouter, embedder: Embedder | None = None) -> Self:
        """Read a saved router; ValueError when ``embedder`` is not the one that it was fitted with."""
        settings = saved.settings
        features = PromptFeatures.restore(saved, embedder)
        router = cls(features.embedder, settings["k"], settings["shrinkage"])
        router.difficulty, router.gaps = (Smoothing(**settings[part]) for part in ("difficulty", "gaps"))
        router._features = features
        router._vectors = saved.tensor("vectors", (None, features.columns))
        router._candidates = saved.candidates
        router._scores = saved.tensor("scores", (len(router._vectors), len(saved.candidates)))
        router._prepare()
        return router

    def _prepare(self) -> None:
        self._mean = self._scores.mean(axis=0)
        rest = self._scores - self._mean
        self._difficulty = rest.mean(axis=1, keepdims=True)
        self._gaps = rest - self._difficulty
        self._points = Points(self._vectors)

    def _nearest(self, vectors: np.ndarray, leave_out: np.ndarray | None = None) -> np.ndarray:
        """(n, training prompts) positions, nearest first; ``leave_out`` (n,) puts one of them last."""
        # Rounded, so that equally near prompts stay equal however many prompts are asked at once.
        distance = np.round(self._points.squared_distances(vectors), 9)
        if leave_out is not None:
            distance[np.arange(len(vectors)), leave_out] = np.inf
        return np.argsort(distance, axis=1, kind="stable")

    def _smoothings(self) -> list[Smoothing]:
        if self.k != "auto" and self.shrinkage != "auto":
            return [Smoothing(self.k, float(self.shrinkage))] * 2
        number = len(self._vectors)
        most = number - 1
        # Each prompt is predicted from the others: with k of all prompts there is one fewer.
        half = max(1, most // 2)
        tried = [min(self.k, most)] if self.k != "auto" else [k for k in TRIED_K if k <= half] or [half]
        parts = (self._difficulty, self._gaps)
        # Per part and k, summed over prompts: target . mean of neighbours, and the latter's square.
        products, squares = np.zeros((2, len(parts), len(tried)))
        for start in range(0, number, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, number))
            near = self._nearest(self._vectors[rows], leave_out=rows)[:, : max(tried)]
            for p, part in enumerate(parts):
                sums = np.cumsum(part[near], axis=1)
                for i, k in enumerate(tried):
                    mean = sums[:, k - 1] / k
                    products[p, i] += (mean * part[rows]).sum()
                    squares[p, i] += (mean**2).sum()
        return [self._best(tried, products[p], squares[p]) for p in range(len(parts))]

    def _best(self, tried: Sequence[int], products: np.ndarray, squares: np.ndarray) -> Smoothing:
        if self.shrinkage == "auto":
            # The squared error |target - keep * mean|^2 is least at keep = target . mean / mean . mean.
            keep = np.clip(np.divide(products, squares, out=np.zeros_like(products), where=squares > 0), 0, 1)
        else:
            keep = np.full(len(tried), 1 - self.shrinkage)
        chosen = int(np.argmin(keep**2 * squares - 2 * keep * products))
        return Smoothing(self.k if self.k != "auto" else tried[chosen], float(1 - keep[chosen]))

