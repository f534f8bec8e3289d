"""``catimage engine``: the built engines on this machine."""

from __future__ import annotations

import typer

from catimage_accel.cli.engine.entries import list_entries, prune, verify
from catimage_accel.cli.engine.inspect import inspect

app = typer.Typer(help="See, check and throw away built engines.", no_args_is_help=True)
app.command("list")(list_entries)
app.command()(inspect)
app.command()(verify)
app.command()(prune)
