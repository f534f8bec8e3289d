"""Scores of prompts drawn by candidates: what routers learn from and are judged on."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CSV_COLUMNS = ("prompt_id", "prompt", "candidate", "score", "cost")
PARQUET_COLUMNS = ("prompt", "candidate", "seed", "metric", "score")


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
        _check_distinct("prompt", self.prompts)
        _check_distinct("candidate", self.candidates)
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

        A prompt's fold follows from its text and the other prompts' texts, never from the order of the rows.
        """
        return [(self.select(train), self.select(held_out)) for train, held_out in self.fold_rows(number, seed)]

    def fold_rows(self, number: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """As ``folds``, but the rows' positions."""
        if not 2 <= number <= len(self):
            raise ValueError(f"{number} folds of {len(self)} prompts, expected between 2 and the number of prompts")
        shuffled = self._shuffled_rows(seed)
        return [
            (np.sort(np.concatenate([*parts[:i], *parts[i + 1 :]])), np.sort(parts[i]))
            for parts in [np.array_split(shuffled, number)]
            for i in range(number)
        ]

    def split(self, held_out_share: float, seed: int = 0) -> tuple[ScoreTable, ScoreTable]:
        """(training, held out); ``held_out_share`` in (0, 1) of the prompts, each part keeping at least one."""
        if not 0 < held_out_share < 1 or len(self) < 2:
            raise ValueError(
                f"cannot hold out a share of {held_out_share} of {len(self)} prompts, expected a share between 0 and 1 "
                f"(both excluded) of at least 2 prompts"
            )
        held_out = min(max(round(len(self) * held_out_share), 1), len(self) - 1)
        shuffled = self._shuffled_rows(seed)
        return self.select(np.sort(shuffled[held_out:])), self.select(np.sort(shuffled[:held_out]))

    def _shuffled_rows(self, seed: int) -> np.ndarray:
        def digest(prompt: str) -> bytes:
            return hashlib.blake2b(f"{seed}\0{prompt}".encode(errors="surrogatepass"), digest_size=16).digest()

        return np.array(sorted(range(len(self)), key=lambda row: digest(self.prompts[row])), dtype=np.intp)

    @classmethod
    def from_csv(cls, path: str | Path) -> ScoreTable:
        """Read columns prompt_id, prompt, candidate, score, cost (others are ignored), one row a pair.

        Candidates and prompts keep the order in which they first appear. Prompt ids with the same text are one
        prompt, whose score is their mean, so that no prompt is both learnt from and judged on. FileNotFoundError when
        there is no such file; ValueError naming the line for a missing column, an unreadable number, an id with two
        texts, a pair that stands there twice, or a candidate with two costs; and for a pair that is missing
        altogether.
        """
        texts: dict[str, str] = {}
        costs: dict[str, float] = {}
        scores: dict[tuple[str, str], float] = {}
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or (), CSV_COLUMNS)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(row[column] is None for column in CSV_COLUMNS):
                    raise ValueError(f"{where}: the row ends early, expected {', '.join(CSV_COLUMNS)}")
                identity, candidate = row["prompt_id"], row["candidate"]
                cost = _number(row["cost"], "cost", where)
                if texts.setdefault(identity, row["prompt"]) != row["prompt"]:
                    raise ValueError(f"{where}: prompt_id {identity!r} has a second text {row['prompt']!r}")
                if costs.setdefault(candidate, cost) != cost:
                    raise ValueError(f"{where}: candidate {candidate!r} costs {cost}, but {costs[candidate]} before")
                if (identity, candidate) in scores:
                    raise ValueError(f"{where}: prompt_id {identity!r} with candidate {candidate!r} stands here twice")
                scores[identity, candidate] = _number(row["score"], "score", where)
        if not scores:
            raise ValueError(f"{path}: no rows below the header")
        samples = [(texts[identity], candidate, score) for (identity, candidate), score in scores.items()]
        return _averaged(path, samples, costs)

    @classmethod
    def from_parquet(cls, path: str | Path, costs: Mapping[str, float], metric: str) -> ScoreTable:
        """Read columns prompt, candidate, seed, metric, score (others are ignored): the mean over the seeds.

        ``costs`` names the candidates, in the table's order; rows of other metrics are skipped. FileNotFoundError when
        there is no such file; ValueError for a file that is not whole, a missing column, a metric that it does not
        hold, candidates other than those of ``costs``, a row that stands there twice, or a missing pair.
        """
        import pyarrow
        import pyarrow.parquet

        if not Path(path).is_file():
            raise FileNotFoundError(f"no score file {path}")
        try:
            # ParquetFile, not read_table: a score file in a folder "x=y" would otherwise gain a partition column.
            columns = pyarrow.parquet.ParquetFile(path).read().to_pydict()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from error
        _check_columns(path, tuple(columns), PARQUET_COLUMNS)
        rows = list(zip(*(columns[column] for column in PARQUET_COLUMNS), strict=True))
        known = sorted({str(row[3]) for row in rows})
        if metric not in known:
            raise ValueError(f"{path} has no scores of metric {metric!r}, only of {', '.join(known) or 'none'}")
        samples = [(prompt, candidate, math.nan if score is None else score)
                   for prompt, candidate, _, name, score in rows if name == metric]  # fmt: skip
        _check_distinct(f"{path}: (prompt, candidate, seed)", [row[:3] for row in rows if row[3] == metric])
        found = {candidate for _, candidate, _ in samples}
        if found != set(costs):
            raise ValueError(
                f"{path} holds scores of the candidates {', '.join(sorted(found))}, "
                f"but costs are given for {', '.join(sorted(costs))}"
            )
        return _averaged(path, samples, costs)


def _averaged(path: str | Path, samples: list[tuple[str, str, float]], costs: Mapping[str, float]) -> ScoreTable:
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in samples))}
    columns = {candidate: column for column, candidate in enumerate(costs)}
    total, count = np.zeros((2, len(rows), len(columns)))
    at = ([rows[prompt] for prompt, _, _ in samples], [columns[candidate] for _, candidate, _ in samples])
    np.add.at(total, at, [score for _, _, score in samples])
    np.add.at(count, at, 1)
    missing = np.argwhere(count == 0)
    if len(missing):
        row, column = missing[0]
        raise ValueError(
            f"{path} lacks {len(missing)} of {count.size} scores, first that of prompt {list(rows)[row]!r} "
            f"with candidate {list(columns)[column]!r}; every prompt needs every candidate"
        )
    return ScoreTable(tuple(rows), tuple(columns), total / count, np.array(list(costs.values())))


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


def _check_distinct(what: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} stands there twice, expected once")
        seen.add(value)


def _check_columns(path: str | Path, found: Sequence[str], expected: Sequence[str]) -> None:
    missing = [column for column in expected if column not in found]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}: expected {', '.join(expected)}, "
            f"found {', '.join(found) or 'none'}"
        )


def _number(text: str, what: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: the {what} is {text!r}, expected a finite number")
    return value
