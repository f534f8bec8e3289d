"""Scores of prompts drawn by candidates: what routers learn from and are judged on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Every prompt's quality with every candidate, and what each candidate costs.

    ``scores`` is (prompts, candidates), higher is better, in the metric's own unit; ``costs`` is (candidates,),
    per image, in any unit as long as it is one. The table is complete and every prompt stands in it once: a
    missing pair, a repeated prompt or candidate, a score or cost that is not finite, or a negative cost is a
    ValueError. One candidate is allowed: there is then nothing to choose. The arrays are read-only.
    """

    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: np.ndarray
    costs: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        check_prompts(self.prompts)
        check_distinct("prompt", self.prompts)
        check_distinct("candidate", self.candidates)
        if not self.prompts or not self.candidates:
            raise ValueError(
                f"a score table needs at least one prompt and one candidate, "
                f"got {len(self.prompts)} prompts and {len(self.candidates)} candidates"
            )
        scores = np.array(self.scores, dtype=np.float64)
        shape = (len(self.prompts), len(self.candidates))
        if scores.shape != shape:
            raise ValueError(f"scores have shape {scores.shape}, expected (prompts, candidates) = {shape}")
        if not np.isfinite(scores).all():
            row, column = np.argwhere(~np.isfinite(scores))[0]
            raise ValueError(
                f"the score of prompt {self.prompts[row]!r} with candidate {self.candidates[column]!r} is "
                f"{scores[row, column]}, expected a finite number"
            )
        costs = check_costs(self.costs)
        if len(costs) != len(self.candidates):
            raise ValueError(f"{len(costs)} costs for {len(self.candidates)} candidates, expected one each")
        for name, array in (("scores", scores), ("costs", costs)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def mean_scores(self) -> np.ndarray:
        """(candidates,): each candidate's mean over the prompts."""
        return self.scores.mean(axis=0)

    def select(self, rows: Sequence[int] | np.ndarray) -> ScoreTable:
        """The table of the prompts at these positions."""
        index = np.asarray(rows, dtype=np.intp)
        return ScoreTable(tuple(self.prompts[i] for i in index), self.candidates, self.scores[index], self.costs)

    def restrict(self, candidates: Sequence[str]) -> ScoreTable:
        """The table of these candidates, in this order; ValueError for one that the table lacks."""
        for name in candidates:
            if name not in self.candidates:
                raise ValueError(f"no candidate {name!r} in the table, which has {', '.join(self.candidates)}")
        columns = [self.candidates.index(name) for name in candidates]
        return ScoreTable(self.prompts, tuple(candidates), self.scores[:, columns], self.costs[columns])

    def folds(self, number: int, seed: int = 0) -> list[tuple[ScoreTable, ScoreTable]]:
        """``number`` pairs (training, held out) in which every prompt is held out once.

        A prompt's fold follows from its text and the other prompts' texts, never from the order of the rows. Prompts
        with the same :func:`plain_text` are held out together.
        """
        return [(self.select(train), self.select(held_out)) for train, held_out in self.fold_rows(number, seed)]

    def fold_rows(self, number: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """As ``folds``, but the rows' positions."""
        shuffled = self._shuffled_rows(seed)
        if not 2 <= number <= len(shuffled):
            raise ValueError(
                f"{number} folds of {len(shuffled)} different prompts, expected between 2 and the number of prompts"
            )
        parts = [_flat(shuffled[part[0] : part[-1] + 1]) for part in np.array_split(np.arange(len(shuffled)), number)]
        return [(_flat([*parts[:i], *parts[i + 1 :]]), held_out) for i, held_out in enumerate(parts)]

    def split(self, held_out_share: float, seed: int = 0) -> tuple[ScoreTable, ScoreTable]:
        """(training, held out); ``held_out_share`` in (0, 1) of the prompts, each part keeping at least one.

        Prompts with the same :func:`plain_text` stay together.
        """
        shuffled = self._shuffled_rows(seed)
        if not 0 < held_out_share < 1 or len(shuffled) < 2:
            raise ValueError(
                f"cannot hold out a share of {held_out_share} of {len(shuffled)} different prompts, expected a share "
                f"between 0 and 1 (both excluded) of at least 2 prompts"
            )
        held_out = min(max(round(len(shuffled) * held_out_share), 1), len(shuffled) - 1)
        return self.select(_flat(shuffled[held_out:])), self.select(_flat(shuffled[:held_out]))

    def _shuffled_rows(self, seed: int) -> list[list[int]]:
        """The rows of each different prompt, in an order that follows from their texts."""

        def digest(row: int) -> bytes:
            text = f"{seed}\0{self.prompts[row]}"
            return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()

        rows: dict[str, list[int]] = {}
        for row in sorted(range(len(self)), key=digest):
            rows.setdefault(plain_text(self.prompts[row]), []).append(row)
        return list(rows.values())


def _flat(parts: Iterable[Iterable[int]]) -> np.ndarray:
    return np.sort(np.array([row for part in parts for row in part], dtype=np.intp))


def plain_text(prompt: str) -> str:
    """The prompt without what does not make it another one: case, width of characters, white space around words.

    What was learnt of one spelling must not be judged on another.
    """
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def check_prompts(prompts: Sequence[str]) -> None:
    """ValueError unless ``prompts`` is a sequence of strings (and not itself one string)."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts!r}, expected a list of strings")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {position} is {prompt!r}, expected a string")


def check_costs(costs: Sequence[float] | np.ndarray) -> np.ndarray:
    """``costs`` as a float64 copy; ValueError unless they are finite, none negative and one of them positive."""
    array = np.array(costs, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or not (array > 0).any():
        raise ValueError(
            f"costs are {array.tolist()}, expected one finite number >= 0 a candidate, at least one of them positive"
        )
    return array


def check_distinct(what: str, values: Iterable[object]) -> None:
    """ValueError naming the first of ``values`` that occurs again."""
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} stands there twice, expected once")
        seen.add(value)
