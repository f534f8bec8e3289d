"""Every kernel once on small sizes that end inside a block, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/kernels/sanitized.py

``clean(tool)`` runs that. The results are not looked at here: ``correctness.py`` does that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # the exit code that asks for no mistaking


def sanitizer() -> str | None:
    """compute-sanitizer's path: of the search path, or where CUDA installs itself."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def clean(tool: str, seconds: float | None = None) -> tuple[bool, str]:
    """Whether the tool found nothing, and what it said last; subprocess.TimeoutExpired after ``seconds``."""
    program = sanitizer()
    if program is None:
        raise FileNotFoundError("compute-sanitizer was not found")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    said = (run.stdout + run.stderr).strip()
    return run.returncode == 0 and "ERROR SUMMARY: 0 errors" in said, said[-2000:]


def main() -> None:
    """Both implementations of each workload; one that there is not is passed over."""
    from checkout import map_kernels

    map_kernels()
    import torch
    from correctness import odd_workloads
    from measure import OURS, the_device

    device = the_device()
    with torch.no_grad():
        for workload in odd_workloads(torch.float16):
            arguments = workload.arguments(device)
            for impl in (*OURS, *workload.libraries):
                try:
                    workload.run(arguments, impl)
                except ValueError:
                    continue
    torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
