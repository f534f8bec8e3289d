"""``catimage router``: fit a catalog's router, and judge routers on prompts that they have not seen."""

from __future__ import annotations

import typer

from catimage_accel.cli.router.evaluate import evaluate_routers
from catimage_accel.cli.router.fit import fit

app = typer.Typer(help="Fit and judge routers.", no_args_is_help=True)
app.command()(fit)
app.command("eval")(evaluate_routers)
