"""Microseconds a prompt that each router takes to predict, one prompt at a time and 256 at once.

    python bench/bench_routing.py [--table FILE.csv | --catalog emoji] [--features text-encoder] [--json FILE]

The routers of ``catimage router eval`` are fitted on half of the table's prompts and asked for the others, which
repeat where a batch needs more. The median of the repeats is told; each of them sees other prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from catimage_accel.catalog import Catalog
from catimage_accel.cli.router.options import Features, embedders_for
from catimage_accel.kernels.device import device_name
from catimage_accel.routing import Router, contenders, read_csv
from catimage_accel.storage import write_atomic

BATCHES = (1, 256)


def microseconds(router: Router, prompts: list[str], batch: int, repeats: int) -> float:
    """A prompt's median time in ``predict`` at this batch size, after one warm-up."""
    stream = cycle(prompts)
    times = []
    for _ in range(repeats + 1):
        asked = list(islice(stream, batch))
        start = time.perf_counter()
        router.predict(asked)
        times.append((time.perf_counter() - start) / batch)
    return 1e6 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a CSV table instead of a catalog's scores")
    parser.add_argument("--catalog", default="emoji", help="folder, hub id or built-in name")
    parser.add_argument("--features", type=Features, default=Features.AUTO, help="auto, minilm, ngrams or text-encoder")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the repeats of a router at one batch size")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    catalog = None if args.table else Catalog.load(args.catalog)
    ratings = catalog.ratings() if catalog else read_csv(args.table)
    training, others = ratings.imputed().split(0.5)
    rows: list[dict[str, Any]] = []
    for name, factory in contenders(*embedders_for(catalog, args.features)).items():
        router = factory().fit(training)
        row: dict[str, Any] = {"router": name}
        for batch in BATCHES:
            once = microseconds(router, list(others.prompts), batch, repeats=1) * batch * 1e-6
            repeats = max(5, min(1000, int(args.seconds / once)))
            row[f"us_a_prompt_at_{batch}"] = round(microseconds(router, list(others.prompts), batch, repeats), 2)
        rows.append(row)
    cpu = torch.device("cpu")
    found = {
        "device": device_name(cpu), "threads": torch.get_num_threads(), "training_prompts": len(training),
        "candidates": len(training.candidates), "features": str(args.features), "routers": rows,
    }  # fmt: skip
    print(f"{found['device']}, {found['threads']} threads, {len(training)} training prompts, {args.features}")
    print(f"{'microseconds a prompt':24}" + "".join(f"{f'batch {batch}':>12}" for batch in BATCHES))
    for row in rows:
        print(f"{row['router']:24}" + "".join(f"{row[f'us_a_prompt_at_{batch}']:12.1f}" for batch in BATCHES))
    if args.json:
        write_atomic(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
