"""What the command says and shows: results on standard output, everything else on standard error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(line: str) -> None:
    """One line on standard error."""
    print(f"catimage: {line}", file=sys.stderr, flush=True)


def results() -> Console:
    """Standard output; in a pipe or a file wide enough for whole tables."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A spinner on standard error, and none of the libraries' own bars, while ``what`` loads."""
    with Console(file=sys.stderr).status(f"loading {what}"):
        from catimage_accel.engines.loading import hide_progress_bars

        hide_progress_bars()
        yield


def progress_bar() -> Progress:
    """A bar with counts and times on standard error; a log file gets its last state only."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )  # fmt: skip


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C within the block acts at its end, so that what belongs together is written together; main thread only."""
    waiting: list[FrameType | None] = []
    handler = signal.signal(signal.SIGINT, lambda _, frame: waiting.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting and callable(handler):
            handler(signal.SIGINT, waiting[0])
