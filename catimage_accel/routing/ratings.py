"""Scores with holes: prompts that lack some candidates are learnt from, and never judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catimage_accel.routing.table import ScoreTable


@dataclass(frozen=True, eq=False)
class Ratings:
    """As a ``ScoreTable``, but pairs may be missing, and prompts may have a kind.

    ``scores`` is (prompts, candidates), NaN where a prompt was not drawn by a candidate; ``kinds`` holds one word a
    prompt ("" for none), or is None. Each prompt has at least one score; otherwise ValueErrors as in ``ScoreTable``.
    """

    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: np.ndarray
    costs: np.ndarray
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        scores = np.array(self.scores, dtype=np.float64)
        whole = ScoreTable(self.prompts, self.candidates, np.where(np.isnan(scores), 0.0, scores), self.costs)
        for row in np.flatnonzero(np.isnan(scores).all(axis=1))[:1]:
            raise ValueError(f"the prompt {whole.prompts[row]!r} has no score, expected one with some candidate")
        if self.kinds is not None and len(self.kinds) != len(whole):
            raise ValueError(f"{len(self.kinds)} kinds for {len(whole)} prompts, expected one each or None")
        scores.flags.writeable = False
        for name in ("prompts", "candidates", "costs"):
            object.__setattr__(self, name, getattr(whole, name))
        object.__setattr__(self, "scores", scores)

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, table: ScoreTable | Ratings) -> Ratings:
        """A table as ratings without holes; ratings as they are."""
        if isinstance(table, Ratings):
            return table
        return cls(table.prompts, table.candidates, table.scores, table.costs)

    @property
    def missing(self) -> int:
        """How many pairs have no score."""
        return int(np.isnan(self.scores).sum())

    @property
    def complete_rows(self) -> np.ndarray:
        """Positions of the prompts that every candidate has drawn."""
        return np.flatnonzero(~np.isnan(self.scores).any(axis=1))

    def select(self, rows: Sequence[int] | np.ndarray) -> Ratings:
        """The ratings of the prompts at these positions."""
        index = np.asarray(rows, dtype=np.intp)
        kinds = None if self.kinds is None else tuple(self.kinds[i] for i in index)
        return Ratings(tuple(self.prompts[i] for i in index), self.candidates, self.scores[index], self.costs, kinds)

    def reordered(self, candidates: Sequence[str]) -> Ratings:
        """With the candidates in this order; ValueError naming both sets unless they are the same."""
        if sorted(candidates) != sorted(self.candidates):
            raise ValueError(
                f"one table has the candidates {', '.join(self.candidates)}, the other {', '.join(candidates)}; "
                f"expected the same ones, in any order"
            )
        columns = [self.candidates.index(name) for name in candidates]
        return Ratings(self.prompts, tuple(candidates), self.scores[:, columns], self.costs[columns], self.kinds)

    def whole(self, source: object) -> ScoreTable:
        """All prompts as a table; ValueError naming ``source`` and the first pair that is missing there."""
        missing = np.argwhere(np.isnan(self.scores))
        if len(missing):
            row, column = missing[0]
            raise ValueError(
                f"{source} lacks {len(missing)} of {self.scores.size} scores, first that of prompt "
                f"{self.prompts[row]!r} with candidate {self.candidates[column]!r}; every prompt needs every candidate"
            )
        return self.complete()

    def complete(self) -> ScoreTable:
        """The prompts that every candidate has drawn: all that may be judged on. ValueError if there are none."""
        rows = self.complete_rows
        if not len(rows):
            raise ValueError(
                f"none of the {len(self)} prompts has a score with each of {', '.join(self.candidates)}, "
                f"expected some to judge on"
            )
        return ScoreTable(tuple(self.prompts[i] for i in rows), self.candidates, self.scores[rows], self.costs)

    def imputed(self) -> ScoreTable:
        """All prompts, to learn from: a missing score is the sum of its prompt's and its candidate's effect.

        The effects are the least-squares fit to the scores that are there, which stay as they are. ValueError when
        two candidates share no prompt, not even by way of others, so that nothing tells how far they lie apart.
        """
        there = ~np.isnan(self.scores)
        if there.all():
            return ScoreTable(self.prompts, self.candidates, self.scores, self.costs)
        known, number = np.where(there, self.scores, 0.0), there.sum(axis=1)
        # The prompts' effects eliminated from the normal equations: one equation a candidate is left.
        drawn = there.astype(np.float64)
        system = np.diag(drawn.sum(axis=0)) - drawn.T @ (drawn / number[:, None])
        if np.linalg.matrix_rank(system) < len(self.candidates) - 1:
            raise ValueError(
                f"the candidates {', '.join(self.candidates)} fall into groups that share no prompt among the "
                f"{len(self)} to learn from, expected prompts drawn by candidates of both"
            )
        right = known.sum(axis=0) - drawn.T @ (known.sum(axis=1) / number)
        candidate = np.linalg.lstsq(system, right, rcond=None)[0]
        prompt = (known - drawn * candidate).sum(axis=1) / number
        scores = np.where(there, self.scores, prompt[:, None] + candidate[None, :])
        return ScoreTable(self.prompts, self.candidates, scores, self.costs)
