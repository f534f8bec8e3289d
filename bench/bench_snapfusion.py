"""SnapFusion's headline on the built-in catalog: few-step students beside their teacher at many steps.

    python bench/bench_snapfusion.py [--catalog emoji] [--number 2000] [--candidate NAME ...] [--work out/snapfusion]

Captions of held-out combinations of nouns are drawn by every candidate, each caption from the same noise, with the
engine that the catalog names as the fastest here. Told are, with 95% intervals by a bootstrap over captions: CLIPScore
by the judge; FID over the judge's image features, against rendered scenes of the same captions; how often the judge
picks the true caption among 16; and each one's difference from the first candidate. (A resample repeats captions, which
raises every FID, so that only the intervals of its differences are shown.) ``--seconds`` times all candidates
in turns, a batch of pictures each, decode included. What was drawn is kept in ``--work``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkout import ROOT, map_package

map_package()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from drawing import draw  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402

from catimage_accel.catalog import Candidate, Catalog  # noqa: E402
from catimage_accel.executor import Executor, Job  # noqa: E402
from catimage_accel.profiling import catalog_executor  # noqa: E402
from catimage_accel.quality import CLIPScore, frechet_distance, picks_caption  # noqa: E402
from catimage_accel.zoo.measure import near_miss_captions  # noqa: E402
from catimage_accel.zoo.render import render  # noqa: E402
from catimage_accel.zoo.training.data import HEADLINE_CAPTIONS, held_out_captions, scene  # noqa: E402

RESAMPLES = 200
PICTURES = 16


@dataclass(frozen=True)
class Judged:
    """One candidate's pictures as the judge sees them, a row a caption."""

    clip_score: np.ndarray
    picked: np.ndarray
    features: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji")
    parser.add_argument("--candidate", action="append", help="NAME, or NAME@STEPS[:GUIDANCE[:RESCALE]]")
    parser.add_argument("--engine", help="instead of the one that is the fastest here")
    parser.add_argument("--number", type=int, default=2000, help="captions")
    parser.add_argument("--start", type=int, default=HEADLINE_CAPTIONS, help="the first of them")
    parser.add_argument("--seconds", type=float, default=0.0, help="for the times; 0 takes none")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "snapfusion")
    options = parser.parse_args()
    catalog = Catalog.load(options.catalog, verify=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    executor = catalog_executor(catalog, device)
    candidates = [named(catalog, name) for name in options.candidate or [one.name for one in catalog.candidates]]
    if options.engine:
        candidates = [replace(candidate, engine=options.engine) for candidate in candidates]
    said = held_out_captions(options.number, options.start)
    captions, misses = [text for _, text in said], near_miss_captions([meaning for meaning, _ in said])
    judge = CLIPScore(catalog.judge_folder)
    scenes = np.stack([render(scene(options.start + index, "test")) for index in range(options.number)])
    references = judge.embed_images(list(scenes))
    judged = {}
    for candidate in candidates:
        pictures = list(draw(catalog, executor, candidate, captions, 0, options.work))
        judged[candidate.name] = Judged(
            judge.score(pictures, captions), picks_caption(judge, pictures, captions, misses),
            judge.embed_images(pictures),
        )  # fmt: skip
    rows = compare(judged, references)
    if options.seconds:
        times = take_times(executor, candidates, captions, options.seconds)
        for row in rows:
            row["ms"] = statistics.median(times[row["candidate"]])
            pairs = zip(times[candidates[0].name], times[row["candidate"]], strict=True)
            row["times_as_fast"] = statistics.median(first / own for first, own in pairs)
    facts = about(device, torch.float32) | {"captions": options.number, "start": options.start}
    path = result_file("snapfusion", device, facts["date"])
    save(path, facts, rows)
    show(rows)
    print(f"written to {path}")


def named(catalog: Catalog, name: str) -> Candidate:
    """A candidate of the catalog; "NAME@STEPS:GUIDANCE:RESCALE" is NAME at others, as far as they are given."""
    known, _, other = name.partition("@")
    candidate = catalog.candidate(known)
    if not other:
        return candidate
    keys = ("steps", "guidance_scale", "guidance_rescale")
    kinds = (int, float, float)
    values = {key: kind(text) for key, kind, text in zip(keys, kinds, other.split(":"), strict=False)}
    label = name.replace("@", "-at-").replace(":", "-guided-", 1).replace(":", "-rescaled-")
    return replace(candidate, name=label, **values)


def compare(judged: dict[str, Judged], references: np.ndarray) -> list[dict[str, Any]]:
    """Figures of each candidate, and of its difference from the first, with 95% intervals."""
    first = next(iter(judged.values()))
    number = len(references)
    draws = [np.random.default_rng(index).integers(0, number, number) for index in range(RESAMPLES)]
    whole = np.arange(number)

    def fid(one: Judged, index: np.ndarray) -> float:
        return frechet_distance(one.features[index], references[index])

    figures = {
        "clip_score": lambda one, index: float(one.clip_score[index].mean()),
        "fid": fid,
        "accuracy": lambda one, index: float(one.picked[index].mean()),
    }
    base = {name: [figure(first, index) for index in draws] for name, figure in figures.items()}
    rows = []
    for candidate, one in judged.items():
        row: dict[str, Any] = {"candidate": candidate}
        for name, figure in figures.items():
            resampled = [figure(one, index) for index in draws]
            change = [ours - theirs for ours, theirs in zip(resampled, base[name], strict=True)]
            row[name] = figure(one, whole)
            row[f"{name}_interval"] = interval(resampled)
            row[f"{name}_change"] = figure(one, whole) - figure(first, whole)
            row[f"{name}_change_interval"] = interval(change)
        rows.append(row)
    return rows


def interval(values: list[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, (0.025, 0.975))]


def take_times(
    executor: Executor, candidates: list[Candidate], captions: list[str], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds a picture, by candidate and round, a batch of ``PICTURES`` together."""
    found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 4 or time.monotonic() < end:
        for candidate in np.random.default_rng(rounds).permutation(np.array(candidates, dtype=object)):
            jobs = [Job(text, candidate, torch.Generator().manual_seed(0)) for text in captions[:PICTURES]]
            start = time.perf_counter()
            for finished in executor.run(jobs):
                if finished.error is not None:
                    raise finished.error
            found[candidate.name].append(1000 * (time.perf_counter() - start) / PICTURES)
        rounds += 1
    return {name: times[1:] for name, times in found.items()}  # engines are built in the first round


def show(rows: list[dict[str, Any]]) -> None:
    def told(row: dict[str, Any], name: str, form: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:{form}} [{low:{form}}, {high:{form}}]"

    def change(row: dict[str, Any], name: str, form: str) -> str:
        low, high = row[f"{name}_change_interval"]
        return f"{row[f'{name}_change']:+{form}} [{low:+{form}}, {high:+{form}}]"

    timed = "ms" in rows[0]
    head = ["candidate", "CLIPScore", "change", "FID", "change", "among 16"] + ["ms", "times as fast"] * timed
    title = "Changes are from the first candidate's; 95% intervals in brackets"
    print_table(title, head, [
        [row["candidate"], told(row, "clip_score", ".4f"), change(row, "clip_score", ".4f"), f"{row['fid']:.4f}",
         change(row, "fid", ".4f"), told(row, "accuracy", ".3f"),
         *([f"{row['ms']:.1f}", f"{row['times_as_fast']:.2f}"] if timed else [])]
        for row in rows
    ])  # fmt: skip


if __name__ == "__main__":
    main()
