"""How near the mean cost of held-out prompts comes to a budget: all prompts in view, and one by one as a stream.

    python bench/bench_budget.py --table FILE.csv [--seeds 8] [--json FILE]

A k-NN router learns from three quarters of the table's prompts and routes the others. For each budget (shares of the
dearest candidate's cost) the lowest and highest deviation over the seeds is told, and what the stream's choices are
predicted to lose in quality against choices with all prompts in view.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from catimage_accel.routing import BudgetPacer, KNNRouter, choose_within_budget, read_csv
from catimage_accel.storage import write_atomic

SHARES = (0.15, 0.25, 0.4, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="a CSV table, as for `catimage router eval`")
    parser.add_argument("--seeds", type=int, default=8, help="splits of the prompts, each also in another order")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    table = read_csv(args.table).imputed()
    found: dict[float, list[tuple[float, float, float]]] = {share: [] for share in SHARES}
    for seed in range(args.seeds):
        training, held_out = table.split(0.25, seed)
        router = KNNRouter().fit(training)
        seen, unseen = router.predict(training.prompts), router.predict(held_out.prompts)
        unseen = unseen[np.random.default_rng(seed).permutation(len(unseen))]
        for share in SHARES:
            budget = share * float(table.costs.max())
            at_once = choose_within_budget(unseen, table.costs, budget)
            one_by_one = BudgetPacer(seen, table.costs, budget).choose(unseen)
            lost = np.take_along_axis(unseen, np.stack([at_once, one_by_one], axis=1), axis=1).mean(axis=0)
            deviations = (table.costs[chosen].mean() / budget - 1 for chosen in (at_once, one_by_one))
            found[share].append((*deviations, float(lost[0] - lost[1])))
    rows: list[dict[str, Any]] = []
    print(f"{len(held_out)} held-out prompts, {args.seeds} seeds; deviation of the mean cost from the budget")
    print(f"{'budget':>8}{'all at once':>22}{'as a stream':>22}{'quality lost':>14}")
    for share, runs in found.items():
        low, high = np.min(runs, axis=0), np.max(runs, axis=0)
        lost = float(np.mean(runs, axis=0)[2])
        spans = "".join(f"{f'{low[i]:+.2%} to {high[i]:+.2%}':>22}" for i in (0, 1))
        print(f"{share * table.costs.max():8.4g}{spans}{lost:14.4f}")
        rows.append({"budget": share * float(table.costs.max()), "at_once": [float(low[0]), float(high[0])],
                     "stream": [float(low[1]), float(high[1])], "quality_lost": lost})  # fmt: skip
    if args.json:
        result = {"prompts": len(held_out), "seeds": args.seeds, "budgets": rows}
        write_atomic(args.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
