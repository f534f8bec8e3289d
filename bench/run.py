"""Every benchmark in turn, one file of results, and the plots of them.

    make bench        or: python bench/run.py [--only kernels unet pipeline]

Needs diffusers, pytest-benchmark and matplotlib (the package with its ``dev`` extra). Results go to
``bench/results/<device>/<date>.json``, or to the folder that the environment variable OUT names, the plots beside
them. Without a CUDA device small stand-ins run on the CPU, and the results and the plots say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from checkout import BENCHMARKS, ROOT, map_package

map_package()

import torch  # noqa: E402
from device_check import write  # noqa: E402
from measure import measure_ceilings, the_device  # noqa: E402
from plots import draw_all  # noqa: E402
from reporting import SMALL, about, result_folder  # noqa: E402

from catimage_accel.kernels.tuning.timing import DeviceTimer  # noqa: E402

Rows = list[dict[str, Any]]


def kernels(folder: Path) -> Rows:
    """A row a workload, with what each implementation reached; the host's median where there is no GPU."""
    file = folder / "pytest.json"
    files = sorted(str(path) for path in BENCHMARKS.glob("bench_*.py"))
    _run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "--benchmark-json", str(file))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for benchmark in json.loads(file.read_text())["benchmarks"]:
        facts = dict(benchmark["extra_info"])
        key = {name: facts.pop(name) for name in ("op", "workload", "batch", "dtype")}
        host = 1000 * benchmark["stats"]["median"]
        row = rows.setdefault(tuple(key.values()), key | {"implementations": {}})
        name = facts.pop("implementation")
        row["implementations"][name] = {"ms": host} | facts | {"host_ms": host}
    return list(rows.values())


def end_to_end(name: str, folder: Path) -> Rows:
    """What ``bench_<name>.py`` found."""
    _run(str(ROOT / "bench" / f"bench_{name}.py"), OUT=str(folder))
    (found,) = folder.glob(f"{name}-*.json")
    rows: Rows = json.loads(found.read_text())["rows"]
    return rows


def _run(*arguments: str, **environment: str) -> None:
    done = subprocess.run([sys.executable, *arguments], env=os.environ | environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"run: {' '.join(arguments[:2])} ended with exit code {done.returncode}; see above")


BENCHES: dict[str, Callable[[Path], Rows]] = {
    "kernels": kernels,
    "unet": partial(end_to_end, "unet"),
    "pipeline": partial(end_to_end, "pipeline"),
}


def main() -> None:
    """Saves after each benchmark, so that an interruption loses the one that was running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    args = parser.parse_args()
    device = the_device()
    facts = about(device, torch.float16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda":
        facts["ceilings"] = asdict(measure_ceilings(device, DeviceTimer(device)))
    path = result_folder(device) / f"{facts['date']}.json"
    results: dict[str, Any] = {"about": facts}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = BENCHES[name](Path(folder))
        write(path, results)
    for plot in (path, *draw_all(path)):
        print(plot)
    if facts["small_cpu_run"]:
        print(SMALL)


if __name__ == "__main__":
    main()
