"""``catimage engine``: the built engines on this machine."""

from __future__ import annotations

import typer

from catimage_accel.cli.engine.build import build
from catimage_accel.cli.engine.entries import list_entries, prune, verify
from catimage_accel.cli.engine.inspect import inspect
from catimage_accel.cli.engine.tune import tune

app = typer.Typer(help="Build, measure, see, check and throw away engines.", no_args_is_help=True)
app.command()(build)
app.command()(tune)
app.command("list")(list_entries)
app.command()(inspect)
app.command()(verify)
app.command()(prune)
