"""compute-sanitizer finds no bad access, race or misused barrier in the kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench" / "kernels"))

import sanitized


@pytest.mark.gpu
@pytest.mark.skipif(sanitized.sanitizer() is None, reason="compute-sanitizer was not found")
@pytest.mark.parametrize("tool", sanitized.TOOLS)
def test_nothing_is_found(tool: str) -> None:
    clean, said = sanitized.clean(tool)
    assert clean, said
