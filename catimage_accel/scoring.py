"""Draws prompts with every candidate of a catalog and keeps their scores in quality.parquet."""

from __future__ import annotations

import io
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from catimage_accel.candidate import LATER_FIELDS
from catimage_accel.catalog import QUALITY_FILE, Candidate, Catalog
from catimage_accel.executor import Executor, Job
from catimage_accel.profiling import profiled_device
from catimage_accel.quantize import Quantization, weights_sha256
from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    import numpy as np

    from catimage_accel.quality import Metric

CHUNK = 32
_Image = tuple[str, Candidate, int]  # prompt, candidate, seed
_DEFINITIONS, _MODELS = b"candidates", b"models"
_WEIGHTS = "weights"


def image_seed(seed: int, prompt: str) -> int:
    """The seed of a prompt's image in a profile: the same for all candidates, different from prompt to prompt.

    It has 32 bits: torch's generator on the CPU takes no notice of more.
    """
    return zlib.crc32(prompt.encode("utf-8"), seed)


@dataclass(frozen=True)
class Part:
    """What is drawn at once: images, and the positions of those that each metric has no score of."""

    number: int
    images: list[_Image]
    lacking: dict[str, list[int]]


@dataclass(frozen=True)
class Scored:
    """Scores of a part's images, (position, score), by one metric. With ``metric`` None the part is done, and ``error``
    is what kept some of its images from being drawn."""

    number: int
    metric: str | None
    scores: list[tuple[int, float]]
    error: Exception | None = None


ScoreParts = Callable[[Sequence[Part], Callable[[int], None]], Iterator[Scored]]
"""Draws and scores parts, telling its second argument of every image; the parts may come in any order."""


def score_here(executor: Executor, metrics: Sequence[Metric]) -> ScoreParts:
    """Part by part with this process's executor."""

    def score_parts(parts: Sequence[Part], advance: Callable[[int], None]) -> Iterator[Scored]:
        for part in parts:
            drawn, error = draw(executor, part.images, advance)
            positions = {one: position for position, one in enumerate(part.images)}
            pictures = {positions[one]: image for one, image in drawn}
            for metric in metrics:
                new = [position for position in part.lacking[metric.name] if position in pictures]
                if new:
                    prompts = [part.images[position][0] for position in new]
                    scores = metric.score([pictures[position] for position in new], prompts)
                    yield Scored(part.number, metric.name, list(zip(new, scores.tolist(), strict=True)))
            yield Scored(part.number, None, [], error)

    return score_parts


def score_candidates(
    catalog: Catalog,
    executor: Executor,
    metrics: Sequence[Metric],
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    chunk: int = CHUNK,
    advance: Callable[[int], None] = lambda _: None,
    estimate: Callable[[int, float | None], None] = lambda *_: None,
    score_parts: ScoreParts | None = None,
) -> int:
    """Draws ``prompts`` x candidates x ``seeds`` and adds their scores to quality.parquet; returns the rows added.

    Every image is drawn once for all ``metrics``, unless an earlier run has its scores. After every ``chunk``
    prompts, and every metric of them, the file is replaced as a whole, so a run that was stopped goes on from there.
    If an image can't be drawn, those of its chunk are scored all the same before its error is raised. Rows of a
    candidate whose definition has changed since are drawn again; rows of other metrics stay. ValueError, before
    anything is drawn, if the file has scores of one of ``metrics`` by another model.

    ``advance`` is told of every image, those of earlier runs included. ``estimate`` is told, before anything is drawn,
    the number of images to draw and the seconds that will take by costs.json, or None where it has no times of this
    device; then, once the first chunk is done, again: the images left and the seconds by what that chunk took.
    ``score_parts`` does the work; None: ``executor`` and ``metrics``, here.
    """
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics are {names}; accepted: at least 1, each once")
    table = _Scores(catalog, metrics)
    before = len(table.rows)
    wanted = list(dict.fromkeys(prompts))
    chunks = [
        [
            (prompt, candidate, image_seed(seed, prompt))
            for prompt in wanted[start : start + chunk]
            for candidate in catalog.candidates
            for seed in seeds
        ]
        for start in range(0, len(wanted), chunk)
    ]
    missing = [[one for one in todo if any(table.lacks(name, one) for name in names)] for todo in chunks]
    left = Counter(candidate.name for part in missing for _, candidate, _ in part)
    seconds = drawing_seconds(catalog, executor, left)
    if left:
        estimate(left.total(), seconds)
    advance(sum(map(len, chunks)) - left.total())
    parts = {
        number: Part(number, images, {
            name: [position for position, one in enumerate(images) if table.lacks(name, one)] for name in names
        })
        for number, images in enumerate(missing) if images
    }  # fmt: skip
    start = time.perf_counter()
    for scored in (score_parts or score_here(executor, metrics))(list(parts.values()), advance):
        images = parts[scored.number].images
        if scored.metric is not None:
            for position, score in scored.scores:
                table.add(scored.metric, images[position], score)
            table.write()
            continue
        if scored.error is not None:
            raise scored.error
        done = Counter(candidate.name for _, candidate, _ in images)
        left -= done
        if left and seconds is None:
            seconds = (time.perf_counter() - start) * _work(catalog, left) / _work(catalog, done)
            estimate(left.total(), seconds)
    return len(table.rows) - before


def drawing_seconds(catalog: Catalog, executor: Executor, images: Mapping[str, int]) -> float | None:
    """The seconds to draw so many ``images`` by candidate name; None if costs.json lacks one of them on this device.

    By the time an image at the largest batch size measured that the executor may use.
    """
    device = profiled_device(executor.device)
    engines = catalog.milliseconds.get(device, {})
    total = 0.0
    for name, number in images.items():
        times = engines.get(catalog.engines_for(catalog.candidate(name), device)[0], {}).get(name)
        if not times:
            return None
        sizes = sorted(int(size) for size in times)
        fitting = [size for size in sizes if size <= executor.max_batch] or sizes[:1]
        total += number * times[str(fitting[-1])] / 1000
    return total


def _work(catalog: Catalog, images: Mapping[str, int]) -> float:
    known = all(name in catalog.flops for name in images)
    return float(sum(number * (catalog.flops[name] if known else 1) for name, number in images.items()))


def draw(
    executor: Executor, items: Sequence[_Image], advance: Callable[[int], None]
) -> tuple[list[tuple[_Image, np.ndarray]], Exception | None]:
    """What could be drawn of ``items``, in their order, and the first error."""
    images: dict[int, np.ndarray] = {}
    error: Exception | None = None
    for finished in executor.run(_jobs(items)):
        if finished.image is None or finished.error is not None:
            error = error or finished.error
            continue
        images[finished.key] = finished.image
        advance(1)
    return [(items[index], images[index]) for index in sorted(images)], error


def _jobs(items: Sequence[_Image]) -> Iterator[Job]:
    for index, (prompt, candidate, seed) in enumerate(items):
        yield Job(prompt, candidate, torch.Generator().manual_seed(seed), key=index)


class _Scores:
    """quality.parquet in memory: (prompt, candidate, seed, metric) -> score."""

    def __init__(self, catalog: Catalog, metrics: Sequence[Metric]) -> None:
        import pyarrow.parquet

        self.path = catalog.folder / QUALITY_FILE
        self.definitions = {candidate.name: _definition(catalog, candidate) for candidate in catalog.candidates}
        self.models = {metric.name: str(found) for metric in metrics if (found := getattr(metric, "digest", None))}
        self.rows: dict[tuple[str, str, int, str], float] = {}
        if not self.path.is_file():
            return
        try:
            stored = pyarrow.parquet.ParquetFile(self.path).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is not a whole Parquet file: {error}") from None
        metadata = stored.schema.metadata or {}
        scored_by = json.loads(metadata.get(_MODELS, b"{}"))
        for name in self.models.keys() & scored_by.keys():
            if self.models[name] != scored_by[name]:
                raise ValueError(
                    f"{self.path} has {name} by another model, of digest {scored_by[name]}, not {self.models[name]}; "
                    f"accepted: that model, or a file without those scores"
                )
        self.models = scored_by | self.models
        drawn_as = {name: _drawing(fields) for name, fields in json.loads(metadata.get(_DEFINITIONS, b"{}")).items()}
        stale = {name for name, now in self.definitions.items() if not _same_drawing(drawn_as.get(name, now), now)}
        # Rows of candidates that the catalog lacks at the moment are kept: it may have them again.
        self.definitions = {name: then for name, then in drawn_as.items() if name not in stale} | self.definitions
        for row in stored.to_pylist():
            if row["candidate"] not in stale:
                self.rows[row["prompt"], row["candidate"], row["seed"], row["metric"]] = row["score"]

    def lacks(self, metric: str, image: _Image) -> bool:
        prompt, candidate, seed = image
        return (prompt, candidate.name, seed, metric) not in self.rows

    def add(self, metric: str, image: _Image, score: float) -> None:
        prompt, candidate, seed = image
        self.rows[prompt, candidate.name, seed, metric] = float(score)

    def write(self) -> None:
        import pyarrow.parquet

        schema = pyarrow.schema(
            {"prompt": "string", "candidate": "string", "seed": "int64", "metric": "string", "score": "float64"},
            metadata={_DEFINITIONS: json.dumps(self.definitions), _MODELS: json.dumps(self.models)},
        )
        rows = [dict(zip(schema.names, (*key, score), strict=True)) for key, score in self.rows.items()]
        content = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), content, compression="zstd")
        write_atomic(self.path, content.getvalue())


def _definition(catalog: Catalog, candidate: Candidate) -> dict[str, Any]:
    model, unet = catalog.resolve_model(candidate.model), candidate.unet_part(catalog.resolve_lora)
    fields = _drawing(asdict(replace(candidate, lora=None, lora_scale=1.0)))  # whose weights are in the digest
    fields[_WEIGHTS] = [weights_sha256(model, part)[:16] for part in (unet, candidate.vae)]
    if candidate.quantization is not None:
        fields["quantization"] = Quantization.load(catalog.resolve_model(candidate.quantization)).digest
    return fields


def _same_drawing(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the two definitions draw alike; files of earlier versions don't tell the weights."""
    return then == {name: value for name, value in now.items() if name in then or name != _WEIGHTS}


def _drawing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of a candidate's fields the picture depends on: an engine changes it by no more than rounding."""
    return {
        key: value
        for key, value in fields.items()
        if key not in ("name", "engine") and value not in (None, LATER_FIELDS.get(key))
    }
