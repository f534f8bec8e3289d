"""The Router protocol, and the routers to compare with: constant, random mix and oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from catimage_accel.routing.storage import SavedRouter
from catimage_accel.routing.table import ScoreTable, check_prompts

STRETCH = 1e-3


class Router(Protocol):
    """Predicts every candidate's quality from the prompt alone.

    ``predict(prompts)`` is (n, candidates) float64 in the unit of the fitted scores, columns as in ``candidates``; a
    prompt's row does not depend on the others, and no prompts give (0, candidates). Before ``fit``, ``candidates``,
    ``predict`` and ``save`` raise ValueError. ``save`` writes a folder that ``load_router`` reads.
    """

    @property
    def candidates(self) -> tuple[str, ...]: ...

    def fit(self, table: ScoreTable) -> Self: ...

    def predict(self, prompts: Sequence[str]) -> np.ndarray: ...

    def save(self, folder: str | Path) -> None: ...


class FittedRouter:
    """What the routers of this package share: the candidates, known once fitted."""

    _candidates: tuple[str, ...] | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.require_fitted()

    def require_fitted(self) -> tuple[str, ...]:
        """The candidates; ValueError before ``fit``."""
        if self._candidates is None:
            raise ValueError(f"this {type(self).__name__} is not fitted, call fit(table) first")
        return self._candidates


class ConstantRouter(FittedRouter):
    """Predicts each candidate's mean score, whatever the prompt: all prompts go to one candidate.

    Its deferral curve is the hull of the candidates, the best random mix of them.
    """

    KIND = "constant"

    def fit(self, table: ScoreTable) -> Self:
        self._candidates, self._means = table.candidates, table.mean_scores
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        self.require_fitted()
        check_prompts(prompts)
        return np.tile(self._means, (len(prompts), 1))

    def save(self, folder: str | Path) -> None:
        names = self.require_fitted()
        SavedRouter(self.KIND, names, {}, {"means": self._means}, Path(folder)).write()

    @classmethod
    def restore(cls, saved: SavedRouter) -> Self:
        router = cls()
        router._candidates, router._means = saved.candidates, saved.tensor("means", (len(saved.candidates),))
        return router


class RandomMixRouter(FittedRouter):
    """The best random mix: prompts are dealt to candidates by lot, never by what they say. Routing has to beat it.

    A prompt's predictions are the mean scores, stretched about their own mean by a factor within a thousandth of 1,
    drawn from the prompt's text and ``seed``. So around the tradeoff (or at the budget) where a constant router
    sends all prompts from one candidate of the hull to the next at once, they change over one by one.
    """

    KIND = "random_mix"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, table: ScoreTable) -> Self:
        self._candidates, self._means = table.candidates, table.mean_scores
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        self.require_fitted()
        check_prompts(prompts)
        lots = np.array([_lot(prompt, self.seed) for prompt in prompts]).reshape(-1, 1)
        centre = self._means.mean()
        return centre + (1 + STRETCH * (2 * lots - 1)) * (self._means - centre)

    def save(self, folder: str | Path) -> None:
        names = self.require_fitted()
        SavedRouter(self.KIND, names, {"seed": self.seed}, {"means": self._means}, Path(folder)).write()

    @classmethod
    def restore(cls, saved: SavedRouter) -> Self:
        router = cls(int(saved.settings["seed"]))
        router._candidates, router._means = saved.candidates, saved.tensor("means", (len(saved.candidates),))
        return router


class OracleRouter(FittedRouter):
    """Knows the scores of the prompts that it was fitted on, and refuses others: the most that routing can reach."""

    KIND = "oracle"

    def fit(self, table: ScoreTable) -> Self:
        self._candidates, self._prompts, self._scores = table.candidates, table.prompts, table.scores
        self._rows = {prompt: row for row, prompt in enumerate(table.prompts)}
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        names = self.require_fitted()
        check_prompts(prompts)
        for prompt in prompts:
            if prompt not in self._rows:
                raise ValueError(f"the oracle has no scores of the prompt {prompt!r}, only of those it was fitted on")
        rows = np.array([self._rows[prompt] for prompt in prompts], dtype=np.intp)
        return self._scores[rows].reshape(len(prompts), len(names))

    def save(self, folder: str | Path) -> None:
        names = self.require_fitted()
        SavedRouter(self.KIND, names, {"prompts": list(self._prompts)}, {"scores": self._scores}, Path(folder)).write()

    @classmethod
    def restore(cls, saved: SavedRouter) -> Self:
        prompts = tuple(saved.settings["prompts"])
        scores = saved.tensor("scores", (len(prompts), len(saved.candidates)))
        return cls().fit(ScoreTable(prompts, saved.candidates, scores, np.ones(len(saved.candidates))))


def check_candidates(fitted: Sequence[str], candidates: Sequence[str]) -> None:
    """ValueError naming both sets unless a router fitted for ``fitted`` is used with just those, in their order."""
    if tuple(candidates) != tuple(fitted):
        raise ValueError(
            f"the router was fitted for the candidates {', '.join(fitted)}, "
            f"but is used with {', '.join(candidates)}; fit it again"
        )


def _lot(prompt: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}\0{prompt}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
