"""What a catalog's figures buy without a router, and what its own router spends: both computed, nothing is drawn.

    catimage zoo prompts more.txt --number 300 --start 20000
    python bench/bench_mixes.py --catalog CATALOG [--without NAME ...] [--prompts more.txt] [--tradeoffs 0 0.05 ...]

The first table: the mean cost of the cheapest mix of candidates that has 98%, 99% and 99.5% of the best candidate's
mean score, with all candidates and without those that are named (by default those that `catimage distill` made), of
float32 candidates and of all. The second, for other prompts: mean cost, mean predicted quality and the most frequent
routes at each tradeoff. Costs are the catalog's own.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from checkout import map_package

map_package()

import numpy as np  # noqa: E402
from reporting import print_table  # noqa: E402

from catimage_accel.candidate import Candidate  # noqa: E402
from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.cli.files import read_prompts  # noqa: E402
from catimage_accel.pipeline import RoutedPipeline  # noqa: E402
from catimage_accel.routing.curves import hull_curve  # noqa: E402
from catimage_accel.zoo.students import PARTS  # noqa: E402

SHARES = (0.98, 0.99, 0.995)
TRADEOFFS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
SHOWN_ROUTES = 3


def is_distilled(candidate: Candidate) -> bool:
    """Whether `catimage distill` made its UNet or its decoder."""
    return not {candidate.unet, candidate.vae}.isdisjoint(PARTS.values())


def mixes(catalog: Catalog, without: set[str]) -> list[list[str]]:
    """The first table's rows."""
    table = catalog.quality_table()
    rows = []
    for kind in ("fp32", None):
        names = [one.name for one in catalog.candidates if kind in (one.precision, None)]
        for title, kept in (("all", names), ("without", [name for name in names if name not in without])):
            some = table.restrict(kept)
            curve = hull_curve(some.mean_scores, some.costs)
            costs = [curve.cost_of(share * float(some.mean_scores.max())) for share in SHARES]
            rows.append([kind or "any", title, *(f"{cost:.0f}" for cost in costs)])
    return rows


def spending(pipe: RoutedPipeline, prompts: list[str], tradeoffs: list[float]) -> list[list[str]]:
    """The second table's rows."""
    rows = []
    for tradeoff in tradeoffs:
        routes = pipe.route(prompts, tradeoff=tradeoff)
        quality = float(np.mean([route.predicted_quality[route.candidate] for route in routes]))
        often = Counter(route.candidate for route in routes).most_common(SHOWN_ROUTES)
        told = ", ".join(f"{name} {count / len(routes):.0%}" for name, count in often)
        rows.append([f"{tradeoff:g}", told, f"{np.mean([route.cost for route in routes]):.0f}", f"{quality:.4f}"])
    return rows


def main() -> None:
    """Computes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji", help="a catalog's folder or name")
    parser.add_argument("--without", nargs="+", metavar="NAME", help="candidates to leave out in every other row")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line, for the second table")
    parser.add_argument("--tradeoffs", type=float, nargs="+", default=list(TRADEOFFS))
    args = parser.parse_args()
    catalog = Catalog.load(args.catalog)
    without = set(args.without or (one.name for one in catalog.candidates if is_distilled(one)))
    for name in without:
        catalog.candidate(name)  # tells of one that is not there
    print(f"without: {', '.join(sorted(without))}")
    columns = ["precision", "candidates", *(f"{share:.1%} of the best" for share in SHARES)]
    print_table(f"the cheapest mix, mean {catalog.cost_unit} an image", columns, mixes(catalog, without))
    if args.prompts is not None:
        prompts, problems = read_prompts(args.prompts)
        for problem in problems:
            print(problem)
        columns = ["tradeoff", "most frequent", f"mean {catalog.cost_unit}", "predicted quality"]
        print_table(f"{len(prompts)} prompts", columns, spending(RoutedPipeline(catalog), prompts, args.tradeoffs))


if __name__ == "__main__":
    main()
