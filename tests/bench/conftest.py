"""Makes the benchmarks importable, as they are scripts."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
sys.path.extend([str(BENCH), str(BENCH / "kernels")])
