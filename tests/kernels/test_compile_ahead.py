"""Every Triton kernel, with its default launch config, compiles for real chips without touching the stack."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SMALL = re.compile(r" 16 rows|, odd")  # what INT8 products have blocks of fewer than 64 rows for
SHARED_LIMIT = 101_376  # bytes a block may have on sm_120, the smallest of the chips


@pytest.mark.parametrize("part", ["common", pytest.param("rest", marks=pytest.mark.slow)])
def test_no_spills(part: str) -> None:
    """STACK is what a thread spills; shared memory must fit; products use the chip's own matrix instructions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    run = subprocess.run([sys.executable, script, part], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    compiled: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) >= 36
    assert [case for case in compiled if case["stack"] != 0 or case["shared"] > SHARED_LIMIT] == []
    if part == "common":
        hopper = [case for case in compiled if "attention fp16" in case["case"] and case["capability"] == 90]
        assert all(case["wgmma"] for case in hopper)
        assert hopper
    products = [case for case in compiled if case["case"].startswith(("int8_linear", "int8_conv"))]
    assert all(case["int8_mma"] for case in products)
    # A Hopper matrix instruction takes 64 rows.
    assert all(case["wgmma"] for case in products if case["capability"] == 90 and not SMALL.search(case["case"]))
    assert products
