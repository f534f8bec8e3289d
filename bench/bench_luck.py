"""How much of what sets candidates apart on a prompt is the luck of one picture, in a catalog's own scores.

    python bench/bench_luck.py [--catalog FOLDER] [--json FILE]

The catalog was profiled with several seeds; two pictures of each prompt are compared. A gap between two candidates that
the text decides is there in both; luck is in one. Then routing with the strongest hint that there could be: the first
picture's scores of the very prompt, by every candidate, judged on the second, as they are and drawn towards the mean as
far as is best (ridge regression, ten folds by prompt). What that gains is about what knowing a prompt is worth.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from checkout import map_package

map_package()

from catimage_accel.catalog import QUALITY_FILE, Catalog  # noqa: E402
from catimage_accel.routing import ScoreTable, judge  # noqa: E402
from catimage_accel.storage import write_atomic  # noqa: E402

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 10


def two_pictures(catalog: Catalog) -> tuple[tuple[str, ...], np.ndarray]:
    """Prompts with two pictures by every candidate, and (2, prompts, candidates) scores."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in pyarrow.parquet.ParquetFile(catalog.folder / QUALITY_FILE).read().to_pylist():
        if row["metric"] == catalog.metric:
            found[row["prompt"]][row["candidate"]][row["seed"]] = row["score"]
    names = [candidate.name for candidate in catalog.candidates]
    prompts, scores = [], []
    for prompt, by_candidate in found.items():
        seeds = set.intersection(*(set(by_candidate[name]) for name in names))
        if len(seeds) > 1:
            prompts.append(prompt)
            scores.append([[by_candidate[name][seed] for name in names] for seed in sorted(seeds)[:2]])
    if not prompts:
        raise SystemExit(f"{catalog.folder} has no prompt with two pictures; catimage profile --first-seed 1 adds some")
    return tuple(prompts), np.moveaxis(np.array(scores), 1, 0)


def drawn_to_the_mean(known: np.ndarray, asked: np.ndarray, ridge: float) -> np.ndarray:
    """``asked`` (prompts, candidates) from ``known``, each prompt from the others of ``FOLDS`` parts."""
    predicted = np.zeros_like(asked)
    order = np.random.default_rng(0).permutation(len(known))
    for part in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, part)
        mean, centred = known[rest].mean(0), known[rest] - known[rest].mean(0)
        weights = np.linalg.solve(
            centred.T @ centred + ridge * np.eye(known.shape[1]), centred.T @ (asked[rest] - asked[rest].mean(0))
        )
        predicted[part] = (known[part] - mean) @ weights + asked[rest].mean(0)
    return predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji", help="a folder, a hub id or a built-in name")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    catalog = Catalog.load(args.catalog, verify=False)
    prompts, scores = two_pictures(catalog)
    names = tuple(candidate.name for candidate in catalog.candidates)
    costs = np.array([catalog.costs[name] for name in names])
    dearest, cheapest = int(np.argmax(costs)), int(np.argmin(costs))
    first, second = (one[:, dearest] - one[:, cheapest] for one in scores)
    found: dict[str, Any] = {
        "prompts": len(prompts), "gap": [names[dearest], names[cheapest]],
        "mean_gap": float((first + second).mean() / 2),
        "gap_deviation": float(np.sqrt((first.var() + second.var()) / 2)),
        "gap_correlation": float(np.corrcoef(first, second)[0, 1]), "routing": [],
    }  # fmt: skip
    print(f"{len(prompts)} prompts, two pictures each; {names[dearest]} above {names[cheapest]}:")
    print("{mean_gap:.4f}, deviation {gap_deviation:.4f}, correlation {gap_correlation:.2f}".format(**found))
    for known, asked in ((0, 1), (1, 0)):
        table = ScoreTable(prompts, names, scores[asked], costs)
        candidates = {
            ridge: judge(drawn_to_the_mean(scores[known], scores[asked], ridge), table, seed=0) for ridge in RIDGES
        }
        best = max(candidates, key=lambda ridge: candidates[ridge].area.value or 0)
        for title, each in (("as they are", judge(scores[known], table)), ("to the mean", candidates[best])):
            share, qnc = each.gain_share, each.qnc
            figures = [share.value, share.low, share.high]
            text = "{:.3f} [{:.3f}, {:.3f}]".format(*figures)
            print(f"by picture {known + 1}'s scores {title}, judged on picture {asked + 1}: gain share {text}, "
                  f"quality-neutral cost {qnc.value}")  # fmt: skip
            found["routing"].append({"known": known, "how": title, "gain_share": figures, "qnc": qnc.value})
    if args.json:
        write_atomic(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
