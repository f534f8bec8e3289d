"""Whether CLIPScore picks easy prompts better than a coin does, judged by a metric that has no part in CLIPScore.

    python bench/bench_difficulty.py [--captions 1000] [--seeds 2] [--work out/difficulty] [--scenes FOLDER]

DiffServe (arXiv 2411.15381) says that it does not. Held-out captions of the built-in catalog are drawn by cheap
candidates and a dear one. For each way to tell a prompt's difficulty, the easiest 25, 50 and 75% of the prompts go to
the cheap candidate and the others to the dear one. Told is by how many points more of the nouns asked for the
recogniser (``recogniser.py``) finds in that mix than in a random mix of the same shares, whose expectation is exact.
"found": the share of the nouns named that it ranks above all of 15 absent ones; "sureness": their mean sigmoid.
"easy": how many points more of the prompts sent to the cheap candidate it draws no worse, than of all prompts.

A gap is the dear candidate's score less the cheap one's. "Same pictures": by the gap of the very pictures that are
judged, their luck included. "Other pictures": by the gap of pictures drawn from another seed. The recogniser's own gap
of the same pictures is the oracle: no choice gains more, and "of possible" is the share of what it gains. Its gap of
other pictures tells what of that is luck. Intervals are 95%, by a bootstrap over prompts.

One thread of a CPU needs about a minute to render the scenes, 8 for the training, 20 for the pictures and one for the
resamples. What was made is kept in ``--work``, and a run that was stopped goes on from there. ``--scenes`` is where
``scenes-train-N.npy`` may be already.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkout import ROOT, map_package

map_package()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from drawing import draw  # noqa: E402
from recogniser import (  # noqa: E402
    DEFAULTS,
    Recogniser,
    found,
    logits,
    mean_average_precision,
    noun_labels,
    sureness,
    train_recogniser,
)
from reporting import about, result_file, save  # noqa: E402
from splits import Resamples, Tasks, interval  # noqa: E402

from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.executor import Executor  # noqa: E402
from catimage_accel.quality import CLIPScore  # noqa: E402
from catimage_accel.zoo.scenes import SceneSpec  # noqa: E402
from catimage_accel.zoo.training.data import FIRST_MEASURED, held_out_captions, rendered, spec  # noqa: E402

DEAR = "teacher-ddim-25"
CHEAP = ("small-dpm-8", "teacher-dpm-6")
SHARES = (0.25, 0.5, 0.75)
TEST_SCENES = 1000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scored:
    """What one candidate's pictures got, (seeds, prompts) each."""

    clip_score: np.ndarray
    found: np.ndarray
    sureness: np.ndarray


def score(
    catalog: Catalog, names: list[str], said: list[tuple[SceneSpec, str]], model: Recogniser, seeds: int, kept: Path
) -> dict[str, Scored]:
    """By candidate."""
    specs, prompts = [meaning for meaning, _ in said], [text for _, text in said]
    judge = CLIPScore(catalog.judge_folder)
    executor = Executor(device=CPU, resolve_model=catalog.resolve_model)
    scored = {}
    for name in names:
        rows = []
        for seed in range(seeds):
            pictures = draw(catalog, executor, catalog.candidate(name), prompts, seed, kept)
            seen = logits(model, pictures)
            rows.append((judge.score(list(pictures), prompts), found(seen, specs, prompts), sureness(seen, specs)))
        scored[name] = Scored(*(np.stack(part) for part in zip(*rows, strict=True)))
    return scored


def quality(model: Recogniser, scenes_cache: Path) -> dict[str, Any]:
    """The recogniser's, on rendered scenes of meanings that it was not trained on."""
    pictures = rendered(TEST_SCENES, "test", scenes_cache)
    specs = [spec(index, "test") for index in range(TEST_SCENES)]
    seen = logits(model, np.array(pictures))
    named = np.array([len(said.groups) for said in specs])
    shares = found(seen, specs, [repr(said) for said in specs])
    return {
        "scenes": TEST_SCENES,
        "nouns_found_among_16": round(float((shares * named).sum() / named.sum()), 4),
        "scenes_mean_found": round(float(shares.mean()), 4),
        "scenes_mean_sureness": round(float(sureness(seen, specs).mean()), 4),
        "mean_average_precision": round(mean_average_precision(seen, noun_labels(specs)), 4),
    }


def compare(
    cheap: Scored, dear: Scored, predicted: np.ndarray, objects: np.ndarray, resamples: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of one pair: a row by way to tell difficulty, metric and share, and a row by correlation."""
    seeds, n = dear.found.shape
    drawn = Resamples.of(n, resamples)
    clip = dear.clip_score - cheap.clip_score
    coins = np.random.default_rng(7).random((seeds, n))
    lost = {"found": dear.found - cheap.found, "sureness": dear.sureness - cheap.sureness}

    def other(values: np.ndarray) -> np.ndarray:
        return np.roll(values, 1, axis=0)

    def always(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (seeds, n))

    rows = []
    for metric, gap in lost.items():
        ways = {
            "recogniser's gap, same pictures": gap,
            "recogniser's gap, other pictures": other(gap),
            "CLIPScore gap, same pictures": clip,
            "CLIPScore gap, other pictures": other(clip),
            "router's predicted gap": always(predicted),
            "objects asked for": always(objects),
            "coin": coins,
        }
        for share in SHARES:
            gains = {way: drawn.gains(list(zip(told, gap, strict=True)), share) for way, told in ways.items()}
            possible = gains["recogniser's gap, same pictures"]
            for way, gain in gains.items():
                row: dict[str, Any] = {"difficulty": way, "metric": metric, "share_to_cheap": share}
                row["random_mix"] = round(float((dear_mean := getattr(dear, metric).mean()) - share * gap.mean()), 5)
                row["all_dear"] = round(float(dear_mean), 5)
                row |= {"gain": interval(gain), "of_possible": interval(gain / possible)}
                if metric == "found":
                    no_worse: Tasks = list(zip(ways[way], -(gap <= 0).astype(float), strict=True))
                    row["easy_of_all"] = round(float((gap <= 0).mean()), 5)
                    row["more_easy_of_those_sent"] = interval(drawn.gains(no_worse, share) / share)
                rows.append(row)
    pairs = {
        ("CLIPScore gap", "recogniser's gap", "same pictures"): (clip, lost["found"]),
        ("CLIPScore gap", "recogniser's gap", "other pictures"): (other(clip), lost["found"]),
        ("CLIPScore gap", "recogniser's sureness gap", "same pictures"): (clip, lost["sureness"]),
        ("CLIPScore gap", "recogniser's sureness gap", "other pictures"): (other(clip), lost["sureness"]),
        ("router's predicted gap", "recogniser's gap", ""): (always(predicted), lost["found"]),
        ("objects asked for", "recogniser's gap", ""): (always(objects), lost["found"]),
        ("recogniser's gap", "recogniser's gap", "other pictures"): (other(lost["found"]), lost["found"]),
        ("CLIPScore gap", "CLIPScore gap", "other pictures"): (other(clip), clip),
    }
    correlations = [
        {"between": a, "and": b, "pictures": pictures}
        | {"spearman": interval(drawn.correlations(list(zip(*values, strict=True))))}
        for (a, b, pictures), values in pairs.items()
    ]
    return rows, correlations


def points(value: dict[str, float]) -> str:
    """In hundredths."""
    return f"{100 * value['value']:+.1f} ({100 * value['low']:+.1f} to {100 * value['high']:+.1f})"


def tell(rows: list[dict[str, Any]]) -> None:
    """The table: a line a pair and way. What is not by its name about another share is about a half."""
    by = {(row["cheap"], row["difficulty"], row["metric"], row["share_to_cheap"]): row for row in rows}
    columns = [*(f"found, {share:.0%} cheap" for share in SHARES), "sureness", "easy"]
    for cheap in dict.fromkeys(row["cheap"] for row in rows):
        first = next(row for row in rows if row["cheap"] == cheap and row["metric"] == "found")
        print(f"\n{cheap}, {first['easy_of_all']:.0%} of prompts easy; points over a random mix, 95% interval")
        print(f"{'told by':34}{'of possible':12}" + "".join(f"{column:>24}" for column in columns))
        for way in dict.fromkeys(row["difficulty"] for row in rows):
            half = by[cheap, way, "found", 0.5]
            values = [by[cheap, way, "found", share]["gain"] for share in SHARES]
            values += [by[cheap, way, "sureness", 0.5]["gain"], half["more_easy_of_those_sent"]]
            share = f"{half['of_possible']['value']:.0%}"
            print(f"{way:34}{share:>11} " + "".join(f"{points(value):>24}" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1000, help="held-out ones, not those of the router's profile")
    parser.add_argument("--seeds", type=int, default=2, help="pictures by caption and candidate, at least 2")
    parser.add_argument("--cheap", nargs="+", default=list(CHEAP), help="candidates, each against the dear one")
    parser.add_argument("--dear", default=DEAR)
    parser.add_argument("--train-scenes", type=int, default=48_000, help="rendered ones, for the recogniser")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="of the recogniser's training")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "difficulty", help="keeps what was made")
    parser.add_argument("--scenes", type=Path, help="folder of rendered scenes; else in --work")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; accepted: at least 2")
    facts = about(CPU, torch.float32)
    scenes_cache = args.scenes or args.work
    config = replace(DEFAULTS, steps=args.steps)
    model = train_recogniser(args.work / f"recogniser-{args.train_scenes}", scenes_cache, args.train_scenes, config)
    facts["recogniser"] = {"train_scenes": args.train_scenes, "steps": args.steps, "batch_size": config.batch_size}
    facts["recogniser"] |= {"quality": quality(model, scenes_cache)}
    catalog = Catalog.load("emoji", verify=False)
    said = held_out_captions(args.captions, FIRST_MEASURED)
    said = list({text: (meaning, text) for meaning, text in said}.values())
    prompts = [text for _, text in said]
    scored = score(catalog, [*args.cheap, args.dear], said, model, args.seeds, args.work / "pictures")
    means = {
        name: {metric: round(float(values.mean()), 4) for metric, values in vars(each).items()}
        for name, each in scored.items()
    }
    facts |= {"captions": len(prompts), "first_caption": FIRST_MEASURED, "seeds": args.seeds, "dear": args.dear,
              "resamples": args.resamples, "means": means}  # fmt: skip
    router = catalog.router()
    predicted = dict(zip(router.candidates, router.predict(prompts).T, strict=True))
    objects = np.array([meaning.num_objects for meaning, _ in said], float)
    rows: list[dict[str, Any]] = []
    facts["correlations"] = []
    for cheap in args.cheap:
        told = predicted[args.dear] - predicted[cheap]
        gained, related = compare(scored[cheap], scored[args.dear], told, objects, args.resamples)
        rows += [{"cheap": cheap} | row for row in gained]
        facts["correlations"] += [{"cheap": cheap} | row for row in related]
    path = result_file("difficulty", CPU, facts["date"])
    save(path, facts, rows)
    print(f"recogniser: {facts['recogniser']}\nmeans: {means}")
    for row in facts["correlations"]:
        value = row["spearman"]
        print(f"{row['cheap']}: Spearman of {row['between']} and {row['and']} {row['pictures']}: "
              f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})")  # fmt: skip
    tell(rows)
    print(f"\nagainst {args.dear}; {path}")


if __name__ == "__main__":
    main()
