"""The ``catimage`` command. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from catimage_accel.cli.console import say

USAGE_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError,
    ConnectionError, ImportError,
)  # fmt: skip


class _Root(TyperGroup):
    """Mounts ``catimage zoo`` when asked for, and turns what is wrong with the input into one line and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), "zoo"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "zoo":
            from catimage_accel.zoo.cli import app as zoo

            return typer.main.get_group(zoo)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                return super().invoke(ctx)
        except USAGE_ERRORS as error:
            if ctx.params.get("show_traceback"):
                traceback.print_exc(file=sys.stderr)
            say(" ".join(str(error).split()))
            raise typer.Exit(2) from None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    # What a library deprecates is no news to who draws a picture.
    if category is UserWarning:
        say(" ".join(str(message).split()))


app = typer.Typer(
    cls=_Root, no_args_is_help=True, pretty_exceptions_show_locals=False, context_settings={"max_content_width": 110},
    help="Draw every prompt with the cheapest candidate that draws it well.",
)  # fmt: skip


@app.callback()
def root(
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Draw every prompt with the cheapest candidate that draws it well."""


from catimage_accel.cli import bench, candidates, distill, draw, engine, gate, profile, quantize, router, serve  # noqa: E402

app.command("generate")(draw.generate)
app.command("demo")(draw.demo)
app.command("candidates")(candidates.list_candidates)
app.command("profile")(profile.profile)
app.command("quantize")(quantize.quantize)
app.command("gate")(gate.gate)
app.command("serve")(serve.serve)
app.add_typer(router.app, name="router")
app.add_typer(distill.app, name="distill")
app.add_typer(bench.app, name="bench")
app.add_typer(engine.app, name="engine")
