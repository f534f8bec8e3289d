"""Tables, and quantities in words, of the ``catimage engine`` commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from catimage_accel.cli.console import results


def print_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """A line and a table of plain text on standard output; the columns called ``numbers`` are aligned to the right."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=any(headings))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = results()
    console.print(escape(title), highlight=False, soft_wrap=True)
    console.print(table)


def engines(number: int) -> str:
    return f"{number} engine{'' if number == 1 else 's'}"


def size(amount: float) -> str:
    """Bytes in the unit of thousands that fits."""
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB" if amount < 999.5 else f"{amount:.0f} GB"


def duration(time: timedelta) -> str:
    """A time in the largest of days, hours, minutes and seconds that it fills."""
    seconds = max(time.total_seconds(), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
