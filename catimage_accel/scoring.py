"""Draws prompts with every candidate of a catalog and keeps their scores in quality.parquet."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from catimage_accel.catalog import QUALITY_FILE, Candidate, Catalog
from catimage_accel.executor import Executor, Job
from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    from catimage_accel.quality import Metric

CHUNK = 32
_DEFINITIONS = b"candidates"


def image_seed(seed: int, prompt: str) -> int:
    """The seed of a prompt's image in a profile: the same for all candidates, different from prompt to prompt.

    It has 32 bits: torch's generator on the CPU takes no notice of more.
    """
    return zlib.crc32(prompt.encode("utf-8"), seed)


def score_candidates(
    catalog: Catalog,
    executor: Executor,
    metric: Metric,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    chunk: int = CHUNK,
    advance: Callable[[int], None] = lambda _: None,
) -> int:
    """Draws ``prompts`` x candidates x ``seeds`` and adds their scores to quality.parquet; returns the rows added.

    After every ``chunk`` prompts the file is replaced as a whole, so a run that was stopped goes on from there.
    Rows of a candidate whose definition has changed since are drawn again. ``advance`` is told of every image, those of
    earlier runs included.
    """
    table = _Scores(catalog, metric.name)
    before = len(table.rows)
    wanted = list(dict.fromkeys(prompts))
    for start in range(0, len(wanted), chunk):
        todo = [
            (prompt, candidate, image_seed(seed, prompt))
            for prompt in wanted[start : start + chunk]
            for candidate in catalog.candidates
            for seed in seeds
        ]
        missing = [one for one in todo if (one[0], one[1].name, one[2]) not in table.rows]
        advance(len(todo) - len(missing))
        if not missing:
            continue
        images: list[Any] = [None] * len(missing)
        for finished in executor.run(_jobs(missing)):
            if finished.error is not None:
                raise finished.error
            images[finished.key] = finished.image
            advance(1)
        scores = metric.score(images, [prompt for prompt, _, _ in missing])
        for (prompt, candidate, seed), score in zip(missing, scores.tolist(), strict=True):
            table.rows[prompt, candidate.name, seed] = float(score)
        table.write()
    return len(table.rows) - before


def _jobs(items: Sequence[tuple[str, Candidate, int]]) -> Iterator[Job]:
    for index, (prompt, candidate, seed) in enumerate(items):
        yield Job(prompt, candidate, torch.Generator().manual_seed(seed), key=index)


class _Scores:
    """quality.parquet in memory: (prompt, candidate, seed) -> score of one metric; other metrics' rows are kept."""

    def __init__(self, catalog: Catalog, metric: str) -> None:
        import pyarrow.parquet

        self.path, self.metric = catalog.folder / QUALITY_FILE, metric
        self.definitions = {candidate.name: _definition(candidate) for candidate in catalog.candidates}
        self.rows: dict[tuple[str, str, int], float] = {}
        self.others: list[dict[str, Any]] = []
        if not self.path.is_file():
            return
        try:
            stored = pyarrow.parquet.ParquetFile(self.path).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is not a whole Parquet file: {error}") from None
        drawn_as = json.loads((stored.schema.metadata or {}).get(_DEFINITIONS, b"{}"))
        for row in stored.to_pylist():
            name = row["candidate"]
            if name not in self.definitions or drawn_as.get(name, self.definitions[name]) != self.definitions[name]:
                continue
            if row["metric"] == metric:
                self.rows[row["prompt"], name, row["seed"]] = row["score"]
            else:
                self.others.append(row)

    def write(self) -> None:
        import pyarrow.parquet

        rows = [
            {"prompt": prompt, "candidate": candidate, "seed": seed, "metric": self.metric, "score": score}
            for (prompt, candidate, seed), score in self.rows.items()
        ]
        schema = pyarrow.schema(
            {"prompt": "string", "candidate": "string", "seed": "int64", "metric": "string", "score": "float64"},
            metadata={_DEFINITIONS: json.dumps(self.definitions)},
        )
        content = io.BytesIO()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows + self.others, schema), content, compression="zstd"
        )
        write_atomic(self.path, content.getvalue())


def _definition(candidate: Candidate) -> dict[str, Any]:
    return {key: value for key, value in asdict(candidate).items() if key != "name"}
