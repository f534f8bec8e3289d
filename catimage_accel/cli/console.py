"""What the command says and shows: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(line: str) -> None:
    """One line on standard error."""
    print(f"catimage: {line}", file=sys.stderr, flush=True)


def results() -> Console:
    return Console(file=sys.stdout)


def progress_bar() -> Progress:
    """A bar with counts and times on standard error; a log file gets its last state only."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )  # fmt: skip
