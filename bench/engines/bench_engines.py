"""One UNet call with every engine that runs here: milliseconds, and how many times as fast as PyTorch in float32.

    python bench/engines/bench_engines.py [--catalog emoji] [--images 1 --images 4 --images 16] [--precision bf16]

For each UNet of the catalog, in each precision that a candidate of it has or that is asked for: 1, 4 and 16 guided
images, so 2, 8 and 32 rows, all threads, all engines of a UNet in turns, rounds in changing order, by the wall. A ratio
is the median of the ratios within each round. Engines are built into an empty cache first: the seconds until the first
picture's step, weights read, and what the cache then holds. Results go to ``bench/results/cpu/`` (or the device's), or
to the folder that OUT names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkout import map_package

map_package()

import torch  # noqa: E402
from interleaved import interleave, warm_up  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402

from catimage_accel.candidate import Candidate  # noqa: E402
from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.engines import ENGINES, PRECISIONS, Engine, EngineUnavailable, LoadedEngines  # noqa: E402
from catimage_accel.engines.cache import EngineCache  # noqa: E402

BASE = "eager fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji", help="folder, hub id or built-in name")
    parser.add_argument("--images", type=int, action="append", help="guided images together; 1, 4 and 16 if absent")
    parser.add_argument("--engine", action="append", help="engines to measure; all that run here if absent")
    parser.add_argument("--unet", action="append", help="subfolders of the models; all UNets if absent")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, default=[], help="beside the catalog's")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of a UNet and size")
    options = parser.parse_args()
    catalog = Catalog.load(options.catalog, verify=False)
    known = sorted({one.unet for one in catalog.candidates})
    if unknown := set(options.unet or ()).difference(known):
        parser.error(f"--unet is {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for unet in dict.fromkeys((one.model, one.unet) for one in catalog.candidates):
            if unet[1] not in (options.unet or unet):
                continue
            cache = EngineCache(Path(folder) / unet[1])
            names = options.engine or ENGINES
            engines, built = load(catalog, unet, names, options.precision, cache, device, skipped)
            for images in options.images or (1, 4, 16):
                rows += measure(unet[1], engines, built, images, device, options.seconds)
    facts = about(device, torch.float32) | {"skipped": skipped}
    path = result_file("unet-engines", device, facts["date"])
    save(path, facts, rows)
    show(rows)
    for name, reason in skipped.items():
        print(f"{name}: {reason}")
    print(f"written to {path}")


def load(
    catalog: Catalog, unet: tuple[str, str], names: list[str] | tuple[str, ...], others: list[str],
    cache: EngineCache, device: torch.device, skipped: dict[str, str],
) -> tuple[dict[str, Engine], dict[str, dict[str, float]]]:  # fmt: skip
    """Engine and precision -> engine, and what it took to have it."""
    loaded = LoadedEngines(device, cache, fall_back=False)
    found: dict[str, Engine] = {}
    built: dict[str, dict[str, float]] = {}
    precisions: dict[str, Candidate] = {}
    for candidate in catalog.candidates:
        if (candidate.model, candidate.unet) == unet:
            precisions.setdefault(candidate.precision, candidate)
    precisions.update((other, replace(precisions["fp32"], precision=other)) for other in others)
    for precision, candidate in precisions.items():
        scales = candidate.quantization
        for name in names:
            start, before = time.perf_counter(), cache.disk_bytes()
            try:
                engine = loaded.get(
                    catalog.resolve_model(candidate.model), candidate.unet, (name,), precision,
                    None if scales is None else catalog.resolve_model(scales),
                )  # fmt: skip
            except (EngineUnavailable, ValueError) as error:
                skipped[f"{name} {precision}"] = str(error)
                continue
            key = f"{name} {precision}"
            step(engine, 1)()
            found[key] = engine
            built[key] = {"load_seconds": time.perf_counter() - start, "cache_bytes": cache.disk_bytes() - before}
            print(f"{unet[1]} {key}: {built[key]['load_seconds']:.1f} s", flush=True)
    return found, built


def step(engine: Engine, images: int) -> partial[torch.Tensor]:
    """One step of so many guided images."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((2 * images, engine.channels, *engine.sample_size), generator=generator).to(engine.device)
    timestep = torch.linspace(1, 999, 2 * images, device=engine.device)
    states = engine.encode_prompts([""] * images + [f"{number} lemons and a dog" for number in range(images)])
    return partial(engine.denoise, sample, timestep, engine.gather(states))


def measure(
    unet: str, engines: dict[str, Engine], built: dict[str, dict[str, float]], images: int, device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    calls, failed = warm_up({name: step(engine, images) for name, engine in engines.items()}, until=float("inf"))
    times = interleave(calls, device, seconds=seconds, wall=True)
    rows = []
    for name in calls:
        row = {"unet": unet, "engine": name, "images": images, **times[name].figures(), **built[name]}
        rows.append({**row, "times_as_fast": times[name].times_as_fast_as(times[BASE])})
    return rows + [{"unet": unet, "engine": name, "images": images, "failed": why} for name, why in failed.items()]


def show(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            row["unet"], row["engine"], str(row["images"]), f"{row['ms']:.1f}", f"{row['p20']:.1f} to {row['p80']:.1f}",
            f"{row['times_as_fast']:.2f}", f"{row['load_seconds']:.1f}", f"{row['cache_bytes'] / 1e6:.1f}",
        )
        for row in rows
        if "ms" in row
    ]  # fmt: skip
    headings = ("unet", "engine", "images", "ms", "20% to 80%", f"times {BASE}", "s to first step", "MB in the cache")
    print_table("One UNet call", headings, table)


if __name__ == "__main__":
    main()
