"""Scores read from files: CSV tables and a catalog's Parquet file, whole or with pairs missing."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from catimage_accel.routing.ratings import Ratings
from catimage_accel.routing.table import check_distinct

CSV_COLUMNS = ("prompt_id", "prompt", "candidate", "score", "cost")
KIND_COLUMN = "kind"
PARQUET_COLUMNS = ("prompt", "candidate", "seed", "metric", "score")


def read_csv(path: str | Path) -> Ratings:
    """Read columns prompt_id, prompt, candidate, score, cost and, where there is one, kind; one row a pair.

    Other columns are ignored, pairs may be missing. Candidates and prompts keep the order in which they first appear.
    Prompt ids with the same text are one prompt, whose score is their mean, so that no prompt is both learnt from and
    judged on. FileNotFoundError when there is no such file; ValueError naming the line for text that is not UTF-8 or
    CSV, a missing column, an unreadable number, an id with two texts, a pair that stands there twice, a candidate with
    two costs, or a prompt of two kinds.
    """
    texts: dict[str, str] = {}
    costs: dict[str, float] = {}
    kinds: dict[str, str] = {}
    scores: dict[tuple[str, str], float] = {}
    has_kinds = False
    for where, row in _rows(path):
        has_kinds = has_kinds or KIND_COLUMN in row
        identity, candidate, prompt = row["prompt_id"], row["candidate"], row["prompt"]
        cost = _number(row["cost"], "cost", where)
        if texts.setdefault(identity, prompt) != prompt:
            raise ValueError(f"{where}: prompt_id {identity!r} has a second text {prompt!r}")
        if costs.setdefault(candidate, cost) != cost:
            raise ValueError(f"{where}: candidate {candidate!r} costs {cost}, but {costs[candidate]} before")
        if (identity, candidate) in scores:
            raise ValueError(f"{where}: prompt_id {identity!r} with candidate {candidate!r} stands here twice")
        kind = row.get(KIND_COLUMN) or ""
        if kinds.setdefault(prompt, kind) != kind:
            raise ValueError(f"{where}: the prompt {prompt!r} is of kind {kind!r}, but {kinds[prompt]!r} before")
        scores[identity, candidate] = _number(row["score"], "score", where)
    if not scores:
        raise ValueError(f"{path}: no rows below the header")
    samples = [(texts[identity], candidate, score) for (identity, candidate), score in scores.items()]
    return _averaged(samples, costs, kinds if has_kinds else None)


def read_parquet(path: str | Path, costs: Mapping[str, float], metric: str) -> Ratings:
    """Read columns prompt, candidate, seed, metric, score (others are ignored): the mean over the seeds.

    ``costs`` names the candidates, in the table's order; rows of other metrics and candidates are skipped, pairs may be
    missing. FileNotFoundError when there is no such file; ValueError for a file that is not whole, a missing column, a
    metric that it does not hold, a candidate without any score, a row that stands there twice, or a score that is not
    finite.
    """
    samples = [sample for sample in _samples(path, metric) if sample[1] in costs]
    scored = {candidate for _, candidate, _ in samples}
    unscored = [candidate for candidate in costs if candidate not in scored]
    if unscored:
        raise ValueError(
            f"{path} has no score of {', '.join(unscored)}; score every candidate with `catimage profile` first"
        )
    return _averaged(samples, costs, None)


def mean_scores(path: str | Path, metric: str) -> dict[str, float]:
    """Candidate -> the mean over the prompts that it has scores of. Errors as ``read_parquet``'s."""
    samples = _samples(path, metric)
    ratings = _averaged(samples, dict.fromkeys((candidate for _, candidate, _ in samples), 1.0), None)
    return dict(zip(ratings.candidates, np.nanmean(ratings.scores, axis=0).tolist(), strict=True))


def _samples(path: str | Path, metric: str) -> list[tuple[str, str, float]]:
    """(prompt, candidate, score) of each row with this metric."""
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
    check_distinct(f"{path}: (prompt, candidate, seed)", [row[:3] for row in rows if row[3] == metric])
    for prompt, candidate, score in samples:
        if not math.isfinite(score):
            raise ValueError(
                f"{path}: the score of prompt {prompt!r} with candidate {candidate!r} is {score}, "
                f"expected a finite number"
            )
    return samples


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", the row) of each row below the header, with all columns."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no table {path}, expected a CSV file")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            _check_columns(path, reader.fieldnames or (), CSV_COLUMNS)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(row[column] is None for column in CSV_COLUMNS):
                    raise ValueError(f"{where}: the row ends early, expected {', '.join(CSV_COLUMNS)}")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not CSV in UTF-8: {error}") from error


def _averaged(
    samples: list[tuple[str, str, float]], costs: Mapping[str, float], kinds: Mapping[str, str] | None
) -> Ratings:
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in samples))}
    columns = {candidate: column for column, candidate in enumerate(costs)}
    total, count = np.zeros((2, len(rows), len(columns)))
    at = ([rows[prompt] for prompt, _, _ in samples], [columns[candidate] for _, candidate, _ in samples])
    np.add.at(total, at, [score for _, _, score in samples])
    np.add.at(count, at, 1)
    means = np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0)
    words = None if kinds is None else tuple(kinds[prompt] for prompt in rows)
    return Ratings(tuple(rows), tuple(columns), means, np.array(list(costs.values())), words)


def _check_columns(path: str | Path, found: Iterable[str], expected: Sequence[str]) -> None:
    found = list(found)
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
