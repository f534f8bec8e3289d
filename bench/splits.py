"""What is gained by sending the easiest prompts to a cheap candidate, over a random mix; with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tasks = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Resamples:
    """Row 0 of ``picks`` is every prompt once, the others are bootstrap draws of them."""

    picks: np.ndarray

    @classmethod
    def of(cls, prompts: int, number: int, seed: int = 0) -> Resamples:
        rng = np.random.default_rng((22, seed))
        return cls(np.concatenate([np.arange(prompts)[None], rng.integers(prompts, size=(number, prompts))]))

    def gains(self, tasks: Tasks, share: float) -> np.ndarray:
        """(1 + resamples,): mean over ``tasks``, pairs of the prompts' difficulties and of what each loses when cheap.

        The mix's mean over that of a random one: the share sent of what all lose, less what those sent lose.
        """
        return np.mean([self._gains(difficulty, lost, share) for difficulty, lost in tasks], axis=0)

    def _gains(self, difficulty: np.ndarray, lost: np.ndarray, share: float) -> np.ndarray:
        difficulty, lost = difficulty[self.picks], lost[self.picks]
        n = lost.shape[1]
        sent = round(share * n)
        hardest = np.partition(difficulty, sent - 1, axis=1)[:, sent - 1 : sent]
        easier, equal = difficulty < hardest, difficulty == hardest
        # Of those as hard as the hardest sent any may be: their expectation.
        rest = (sent - easier.sum(1)) * (lost * equal).sum(1) / equal.sum(1)
        return sent / n * lost.mean(1) - ((lost * easier).sum(1) + rest) / n

    def correlations(self, tasks: Tasks) -> np.ndarray:
        """(1 + resamples,): Spearman's, mean over the pairs ``tasks``."""
        return np.mean([[_spearman(a[row], b[row]) for row in self.picks] for a, b in tasks], axis=0)


def interval(drawn: np.ndarray) -> dict[str, float]:
    """The value, which is the first, and the middle 95% of the others."""
    low, high = np.nanpercentile(drawn[1:], [2.5, 97.5])
    return {"value": round(float(drawn[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal ones get their mean rank."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[place]
