"""One run on a GPU machine: is everything right, which launch configs suit it, how fast is it against what there is.

    python bench/device_check.py

from a plain checkout: torch and triton are enough, nothing needs to be installed. After the device's ceilings come five
stages: correctness, tuning, correctness of odd shapes with what was tuned, benchmarks, compute-sanitizer where it is.
All of it, the compiling of the CUDA kernels included, takes under nine minutes: a stage gets its share of what is
left when it begins, and what it has when its time is out is kept. Shapes that an earlier run tuned come last, and their
configs stay. Where only some stages are asked for, they share the time of all. Results go to
``bench/results/<device>/<date>.json``, or to the folder that the environment variable OUT names; tuned launch configs
go where the kernels look for them, and beside the results. A table comes last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkout import ROOT, map_kernels

SECONDS = 530.0  # of all stages and what comes before; a row that is begun is ended
SHARES = {"correctness": 23, "tuning": 31, "tuned": 7, "benchmarks": 28, "sanitizer": 11}
SAVE_EVERY = 5.0


def build_cuda() -> None:
    """Compiles the CUDA kernels where nvcc is there and they are not, as they are now; before they are imported."""
    script = ROOT / "kernels" / "build.py"
    library = runpy.run_path(str(script))["CUDA"]
    if not library.path.exists() or library.is_stale(library.path):
        start = time.monotonic()
        run = subprocess.run([sys.executable, script, "cuda"], capture_output=True, text=True)
        print((run.stdout + run.stderr).strip()[-2000:], f"({time.monotonic() - start:.0f} s)", flush=True)


def write(path: Path, content: Any) -> None:
    """Atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Report:
    """What was found so far, and the file that has it."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"about": about, "stages": {}}
        self._saved = 0.0

    def stage(self, name: str, rows: Iterable[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """Takes rows until there are no more or time is out; an error ends the stage, not the run."""
        start = time.monotonic()
        found: list[dict[str, Any]] = []
        state: dict[str, Any] = {"complete": False, "rows": found}
        self.content["stages"][name] = state
        try:
            for row in rows:
                found.append(row)
                if time.monotonic() - self._saved > SAVE_EVERY:
                    self.save()
                if time.monotonic() - start > seconds:
                    break
            else:
                state["complete"] = True
        except Exception as error:
            state["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        state["seconds"] = round(time.monotonic() - start, 1)
        self.save()
        end = "complete" if state["complete"] else state.get("error", "time is out")
        print(f"{name}: {len(found)} rows in {state['seconds']} s, {end}", flush=True)
        return found

    def save(self) -> None:
        """All of it, atomically."""
        write(self.path, self.content)
        self._saved = time.monotonic()


def correctness(device: Any, *, odd_only: bool) -> Iterable[dict[str, Any]]:
    from correctness import checks

    for check in checks(device, odd_only=odd_only):
        if not check.right:
            print(f"WRONG {check}", flush=True)
        share = check.share if check.share is None or math.isfinite(check.share) else str(check.share)
        yield {**asdict(check), "share": share, "right": check.right}


def tuning(device: Any, seconds: float, beside: Path) -> Iterable[dict[str, Any]]:
    """Each op gets an equal share of the time that those before it left; an error ends its op, not the stage.

    What is tuned is written and used at once: a stage whose time is out never comes back to where it left.
    """
    from catimage_accel.kernels import tuning as configs
    from catimage_accel.kernels.tuning.tune import TUNED_OPS, tune

    end = time.monotonic() + seconds
    for position, op in enumerate(TUNED_OPS):
        now = time.monotonic()
        slug = configs.device_slug(device)
        entries = configs.read_entries(op, slug) or []
        try:
            for tuned in tune(op, device, until=now + (end - now) / (len(TUNED_OPS) - position)):
                entries = configs.with_entry(entries, tuned.entry)
                for folder in {configs.FOLDER, beside}:
                    write(folder / f"{op}.{slug}.json", entries)
                configs.forget()
                yield asdict(tuned)
        except Exception as error:
            traceback.print_exc()
            yield {"op": op, "error": f"{type(error).__name__}: {error}"}


def benchmarks(device: Any, timer: Any, ceilings: Any) -> Iterable[dict[str, Any]]:
    """Every workload, those first that a goal is set for."""
    import torch
    from attention_baselines import attention_baselines
    from correctness import OPS
    from measure import by_goal, calls, meaning, workloads

    for workload in by_goal(map(workloads, OPS)):
        baselines = attention_baselines if workload.op == "attention" else None
        found: dict[str, Any] = {}
        with torch.no_grad():
            try:
                ready = calls(workload, workload.arguments(device), baselines)
            except Exception as error:  # out of memory, most likely
                ready, found["any"] = {}, not_run(error)
            for name, call in ready.items():
                try:
                    found[name] = meaning(workload, timer.time(call), ceilings)
                except Exception as error:
                    found[name] = not_run(error)
        yield {"op": workload.op, "workload": workload.name, "batch": workload.batch, "dtype": str(workload.dtype),
               "implementations": found}  # fmt: skip


def not_run(error: Exception) -> dict[str, str]:
    """In place of figures."""
    return {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}


def sanitizing(seconds: float) -> Iterable[dict[str, Any]]:
    """What compute-sanitizer finds, tool after tool."""
    from sanitized import TOOLS, watch

    end = time.monotonic() + seconds
    for tool, left in remaining(TOOLS):
        found = watch(tool, (end - time.monotonic()) * left)
        row = {"tool": tool, "reached": found.reached}
        if found.right is None:
            print(f"{tool} not run: {found.said[-300:]}", flush=True)
            yield row | {"not_run": found.said[-300:]}
            continue
        if not found.right:
            print(f"WRONG {tool}: {found.said}", flush=True)
        yield row | {"right": found.right, "said": found.said[-300:]}


def remaining(shares: dict[str, int]) -> Iterable[tuple[str, float]]:
    """In turn, each one's part of what those before it left."""
    left = sum(shares.values())
    for name, share in shares.items():
        yield name, share / left
        left -= share


def table(rows: list[dict[str, Any]], ours: tuple[str, ...]) -> list[str]:
    """A line a workload: our best, the best of the others, and torch.compile."""
    lines = [f"{'':43}{'ours':>8} {'impl':6}{'best other':>10} {'':13}{'ratio':>5}{'compile':>8}{'%copy':>6}{'%mm':>5}"]
    for row in rows:
        found = {name: value for name, value in row["implementations"].items() if "ms" in value}
        mine = min((name for name in found if name in ours), key=lambda name: found[name]["ms"], default=None)
        theirs = min((name for name in found if name not in ours), key=lambda name: found[name]["ms"], default=None)
        title = f"{row['op']} {row['workload']}".replace("channels_last", "NHWC").replace(", batch ", " b")[:42]
        if mine is None or theirs is None:
            lines.append(f"{title:43}not run")
            continue
        best, other = found[mine], found[theirs]
        compiled = f"{found['torch.compile']['ms'] / best['ms']:.2f}" if "torch.compile" in found else ""
        lines.append(
            f"{title:43}{best['ms']:8.4f} {mine:6}{other['ms']:10.4f} {theirs:13}{other['ms'] / best['ms']:5.2f}"
            f"{compiled:>8}{best['percent_of_copy']:6.0f}{best['percent_of_matmul']:5.0f}"
        )
    return lines


def main() -> None:
    """Runs the stages that were asked for; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=SHARES, default=list(SHARES))
    args = parser.parse_args()
    end = time.monotonic() + SECONDS
    import torch
    import triton

    if not torch.cuda.is_available():
        sys.exit("device_check: there is no CUDA device")
    build_cuda()
    map_kernels()
    from measure import OURS, measure_ceilings, the_device

    from catimage_accel.kernels.device import device_name
    from catimage_accel.kernels.tuning import device_slug
    from catimage_accel.kernels.tuning.timing import DeviceTimer

    device = the_device()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "bench" / "results" / device_slug(device)
    timer = DeviceTimer(device)
    ceilings = measure_ceilings(device, timer)
    about = {
        "device": device_name(device), "date": date, "torch": torch.__version__, "triton": triton.__version__,
        "python": sys.version.split()[0], "ceilings": asdict(ceilings),
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    report = Report(out / f"{date}.json", about)
    stages: dict[str, Callable[[float], Iterable[dict[str, Any]]]] = {
        "correctness": lambda _: correctness(device, odd_only=False),
        "tuning": lambda seconds: tuning(device, seconds, out),
        "tuned": lambda _: correctness(device, odd_only=True),
        "benchmarks": lambda _: benchmarks(device, timer, ceilings),
        "sanitizer": sanitizing,
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, share in remaining({name: share for name, share in SHARES.items() if name in args.stages}):
        seconds = (end - time.monotonic()) * share
        rows[name] = report.stage(name, stages[name](seconds), seconds)
    print("\n".join(table(rows.get("benchmarks", []), OURS)))
    checked = rows.get("correctness", []) + rows.get("tuned", [])
    watched = [row for row in rows.get("sanitizer", []) if "right" in row]
    wrong = [row for row in checked + watched if not row["right"]]
    by_impl = dict(Counter(row["impl"] for row in checked))
    copy, matmul = ceilings.copy_gb_s, {k.removeprefix("torch."): round(v) for k, v in ceilings.matmul_tflop_s.items()}
    tools = [f"{row['tool']}: {row['reached']}" for row in watched]
    print(f"copy {copy:.0f} GB/s, matmul {matmul} TFLOP/s")
    print(f"checks {by_impl}, compute-sanitizer {tools}, {len(wrong)} wrong; {report.path}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
