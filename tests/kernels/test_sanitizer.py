"""compute-sanitizer finds no bad access, race or misused barrier in the kernels, and what its words mean."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench" / "kernels"))

import sanitized

CLEAN = "========= ERROR SUMMARY: 0 errors"
NO_HAZARDS = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
HAZARDS = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)"
REFUSED = "========= Error: Device not supported.\n========= ERROR SUMMARY: 1 error"
SOME = "watched 0 of 3, next: geglu, a\nwatched 1 of 3, next: geglu, b\n"
ALL = f"{SOME}watched 3 of 3\n"


@pytest.mark.parametrize(
    ("exit_code", "said", "right", "reached"),
    [
        (0, ALL + CLEAN, True, "3 of 3"),
        (0, ALL + NO_HAZARDS, True, "3 of 3"),
        (0, SOME + CLEAN, True, "1 of 3, next: geglu, b"),
        (0, ALL + HAZARDS, False, "3 of 3"),
        (86, SOME + "========= ERROR SUMMARY: 4 errors", False, "1 of 3, next: geglu, b"),
        (86, SOME, False, "1 of 3, next: geglu, b"),
        (1, SOME + CLEAN, None, "1 of 3, next: geglu, b"),  # the program failed, and not in a kernel
        (0, SOME.splitlines()[0] + f"\n{CLEAN}", None, "0 of 3, next: geglu, a"),
        (0, ALL, None, "3 of 3"),  # nobody watched
        (0, CLEAN, None, ""),  # the program was never started
        (86, REFUSED, None, ""),
        (255, REFUSED, None, ""),
    ],
)
def test_a_summary_counts_where_kernels_were_watched(
    exit_code: int, said: str, right: bool | None, reached: str
) -> None:
    assert sanitized.verdict(exit_code, said) == sanitized.Watched(right, reached, said)


SCRIPT = """#!/bin/sh
echo "$@"
echo "watched 2 of 2"
echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
sleep {seconds}
"""


@pytest.mark.parametrize(("seconds", "right"), [(0, True), (20, None)])
def test_the_tool_is_started_with_a_limit(
    seconds: int, right: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compute-sanitizer"
    with open(script, "w", opener=partial(os.open, mode=0o755)) as file:
        file.write(SCRIPT.format(seconds=seconds))
    monkeypatch.setattr(sanitized, "sanitizer", lambda: str(script))
    found = sanitized.watch("racecheck", 2.0)
    assert found.right is right
    assert ("--seconds -3.0" in found.said) if right else (found.said == "not ended after 2 s")


def test_without_the_tool_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitized, "sanitizer", lambda: None)
    assert sanitized.watch("memcheck") == sanitized.Watched(None, "", "compute-sanitizer was not found")


@pytest.mark.gpu
@pytest.mark.skipif(sanitized.sanitizer() is None, reason="compute-sanitizer was not found")
@pytest.mark.parametrize("tool", sanitized.TOOLS)
def test_nothing_is_found(tool: str) -> None:
    found = sanitized.watch(tool)
    assert found.right, found.said
