"""Every kernel once on small sizes that end inside a block, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/kernels/sanitized.py

``watch(tool)`` runs that. The results are not looked at here: ``correctness.py`` does that.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOOLS = {"memcheck": 2, "racecheck": 1, "synccheck": 1}  # the tool and its share of the time
FOUND = 86  # the exit code that asks for no mistaking
ENDING_SECONDS = 5.0  # what the process may take to end once it was told to
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
REACHED = re.compile(r"^watched (\d+) (of \d+.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Watched:
    """What a tool has to say."""

    right: bool | None  # None where it says nothing of the kernels
    reached: str  # how many of the workloads, and which would have been next
    said: str  # the end of all that was written, or why nothing was


def sanitizer() -> str | None:
    """compute-sanitizer's path: of the search path, or where CUDA installs itself."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def watch(tool: str, seconds: float = math.inf) -> Watched:
    """As many workloads as there is time for."""
    program = sanitizer()
    if program is None:
        return Watched(None, "", "compute-sanitizer was not found")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__]
    limit = None
    if math.isfinite(seconds):
        limit = max(1.0, seconds)
        command += ["--seconds", str(limit - ENDING_SECONDS)]
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Watched(None, "", f"not ended after {limit:.0f} s")
    return verdict(run.returncode, run.stdout.strip())


def verdict(exit_code: int, said: str) -> Watched:
    """What an exit code and an output mean.

    A tool may refuse the device, or report no errors of a program that it did not start: without a word from the
    program itself its summary is none of the kernels.
    """
    *_, (number, rest) = [("", ""), *REACHED.findall(said)]
    found = [int(count) for count in SUMMARY.findall(said)]
    right: bool | None = None
    if number and (exit_code == FOUND or any(found)):
        right = False
    elif number and int(number) and exit_code == 0 and found:
        right = True
    return Watched(right, f"{number} {rest}".strip(), said[-2000:])


def main() -> None:
    """Both implementations of each workload; one that there is not is passed over."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="no workload is begun after them")
    args = parser.parse_args()
    from checkout import map_kernels

    map_kernels()
    import torch
    from correctness import odd_workloads
    from measure import OURS

    device = torch.device("cuda", torch.cuda.current_device())
    workloads = list(odd_workloads(torch.float16))
    torch.ones(1, device=device).cpu()  # a device that is refused is to fail before anything is said to be watched
    with torch.no_grad():
        for number, workload in enumerate(workloads):
            print(f"watched {number} of {len(workloads)}, next: {workload.op}, {workload.name}", flush=True)
            if time.monotonic() - start > args.seconds:
                return
            arguments = workload.arguments(device)
            for impl in (*OURS, *workload.libraries):
                try:
                    workload.run(arguments, impl)
                except ValueError:
                    continue
            torch.cuda.synchronize(device)
    print(f"watched {len(workloads)} of {len(workloads)}", flush=True)


if __name__ == "__main__":
    main()
