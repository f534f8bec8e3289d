"""``catimage generate`` and ``catimage demo``: prompts to pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catimage_accel.catalog import BUILT_IN, Catalog
from catimage_accel.cli.console import interrupts_wait, loading, progress_bar, results, say
from catimage_accel.cli.files import OutFolder, read_prompts

if TYPE_CHECKING:
    from PIL import Image

    from catimage_accel.pipeline import Route

MAX_SEED = 2**63 - 1
INTERRUPTED = 130

CatalogOption = Annotated[str, typer.Option(help="A catalog: a folder, a hub id, or the built-in name.")]
Tradeoff = Annotated[
    float | None,
    typer.Option(help="Quality, in the catalog's metric, given up to save the dearest candidate's cost; 0 or more."),
]
Budget = Annotated[float | None, typer.Option(help="Mean cost an image, in the catalog's unit, instead of a tradeoff.")]
MinQuality = Annotated[
    float | None,
    typer.Option(help="Draw each prompt with the cheapest candidate that is predicted to reach this quality."),
]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Picture i has seed SEED + i; random if absent.")]
Out = Annotated[Path, typer.Option(help="Folder for pictures and routes.jsonl.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")]


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with more prompts, one a line.")] = None,
    tradeoff: Tradeoff = None,
    budget: Budget = None,
    min_quality: MinQuality = None,
    candidate: Annotated[str | None, typer.Option(help="Draw everything with this candidate, no routing.")] = None,
    catalog: CatalogOption = BUILT_IN,
    seed: Seed = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size if absent.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size if absent.")] = None,
    out: Out = Path("out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a picture instead of a table.")] = False,
    device: Device = None,
) -> None:
    """Draw prompts, each with the cheapest candidate that draws it well."""
    texts = list(prompt or [])
    problems: list[str] = []
    if prompts is not None:
        more, problems = read_prompts(prompts)
        texts += more
    for problem in problems:
        say(problem)
    if not texts:
        raise ValueError("no prompt to draw; accepted: prompts as arguments, or --prompts FILE with one a line")
    choice = {"tradeoff": tradeoff, "budget": budget, "min_quality": min_quality, "candidate": candidate}
    run = _Run(catalog, texts, seed, out, device, {**choice, "height": height, "width": width})
    if as_json:
        code = run.draw(lambda row: print(json.dumps(row), flush=True))
    else:
        code = run.draw()
        run.print_table()
    raise typer.Exit(code or (1 if problems else 0))


def demo(
    out: Out = Path("out/demo"),
    tradeoff: Tradeoff = None,
    budget: Budget = None,
    catalog: CatalogOption = BUILT_IN,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 7,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row of the contact sheet.")] = 5,
    device: Device = None,
) -> None:
    """Draw twenty prompts, easy to hard, and a contact sheet that says who drew what."""
    texts = files("catimage_accel.cli").joinpath("demo_prompts.txt").read_text(encoding="utf-8").splitlines()
    run = _Run(catalog, texts, seed, out, device, {"tradeoff": tradeoff, "budget": budget}, fresh=True)
    code = run.draw()
    if run.drawn:
        path = run.write_contact_sheet(columns)
        say(f"{len(run.drawn)} pictures in {out}, contact sheet {path}")
    run.print_table()
    raise typer.Exit(code)


class _Run:
    """One drawing of many prompts. Building it validates all that can be validated before work."""

    def __init__(
        self, catalog: str, texts: Sequence[str], seed: int | None, out: Path, device: str | None,
        options: dict[str, Any], *, fresh: bool = False,
    ) -> None:  # fmt: skip
        loaded = Catalog.load(catalog)
        if options.get("candidate") is not None:
            loaded.candidate(options["candidate"])
        self.texts = texts
        self.drawn: dict[int, tuple[Image.Image, Route]] = {}
        self.out = OutFolder(out, fresh=fresh)
        with loading(f"catalog {loaded.name}"):
            import torch

            from catimage_accel.pipeline import RoutedPipeline

            first = random.SystemRandom().randrange(2**32) if seed is None else seed
            seeds = [(first + index) % (MAX_SEED + 1) for index in range(len(texts))]
            self.pipeline = RoutedPipeline(loaded, device)
            choice = {key: options.get(key) for key in ("tradeoff", "budget", "min_quality", "candidate")}
            routes = self.pipeline.route(texts, **choice)
            self._total_steps = sum(loaded.candidate(route.candidate).steps for route in routes)
            self._stream = self.pipeline.stream(
                texts, generator=[torch.Generator().manual_seed(each) for each in seeds],
                callback_on_step_end=self._on_step, **options,
            )  # fmt: skip
        self._advance: Callable[[], None] = lambda: None

    def _on_step(self, _: Any, __: int, ___: Any, ____: dict[str, Any]) -> dict[str, Any]:
        self._advance()
        return {}

    def draw(self, on_row: Callable[[dict[str, Any]], None] = lambda _: None) -> int:
        """Draws and saves all; returns the exit code: 0, 1 if a prompt failed, 130 after Ctrl-C."""
        failed = 0
        with progress_bar() as progress:
            bar = progress.add_task(f"0 of {len(self.texts)} pictures", total=self._total_steps)
            self._advance = lambda: progress.advance(bar)
            try:
                self.out.begin()
                for drawn in self._stream:
                    if drawn.error is not None:
                        failed += 1
                        reason = " ".join(f"{type(drawn.error).__name__}: {drawn.error}".split())
                        say(f"prompt {drawn.index + 1}, {drawn.route.prompt!r}, was not drawn: {reason}")
                        continue
                    with interrupts_wait():
                        on_row(self.out.add(drawn.index, drawn.image, drawn.route))
                        self.drawn[drawn.index] = (drawn.image, drawn.route)
                    progress.update(bar, description=f"{len(self.drawn)} of {len(self.texts)} pictures")
            except (KeyboardInterrupt, OSError) as error:
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
                say(f"{reason}; {len(self.drawn)} of {len(self.texts)} pictures are kept in {self.out.folder}")
                return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        return 1 if failed else 0

    def write_contact_sheet(self, columns: int) -> Path:
        import io

        from catimage_accel.contact_sheet import contact_sheet
        from catimage_accel.storage import write_atomic

        pairs = [self.drawn[position] for position in sorted(self.drawn)]
        unit = self.pipeline.catalog.cost_unit
        notes = [f"{route.candidate}\n{_quality(route)}, {route.cost:.3g} {unit}" for _, route in pairs]
        sheet = contact_sheet([image for image, _ in pairs], [route.prompt for _, route in pairs], notes, columns)
        content = io.BytesIO()
        sheet.save(content, "PNG", optimize=True)
        path = self.out.folder / "contact_sheet.png"
        write_atomic(path, content.getvalue())
        return path

    def print_table(self) -> None:
        """Candidates used, mean predicted quality, and the cost against always using the dearest."""
        from rich.table import Table

        routes = [route for _, route in self.drawn.values()]
        if not routes:
            return
        catalog = self.pipeline.catalog
        costs = catalog.costs
        dearest = max(costs, key=lambda name: costs[name])
        table = Table(title=f"{len(routes)} pictures with catalog {catalog.name}, cost in {catalog.cost_unit}")
        for heading in ("candidate", "pictures", "mean predicted quality", "cost an image", "cost"):
            table.add_column(heading, justify="left" if heading == "candidate" else "right")
        for name, cost in sorted(costs.items(), key=lambda item: item[1]):
            mine = [route for route in routes if route.candidate == name]
            if mine:
                table.add_row(name, str(len(mine)), _mean_quality(mine), f"{cost:.3g}", f"{cost * len(mine):.4g}")
        table.add_section()
        spent, most = sum(route.cost for route in routes), costs[dearest] * len(routes)
        table.add_row("all", str(len(routes)), _mean_quality(routes), f"{spent / len(routes):.3g}", f"{spent:.4g}")
        table.add_row(
            f"always {dearest}", str(len(routes)), _mean_quality(routes, dearest), f"{costs[dearest]:.3g}",
            f"{most:.4g}",
        )  # fmt: skip
        table.add_row("share of that cost", "", "", "", f"{spent / most:.0%}")
        results().print(table)


def _quality(route: Any) -> str:
    quality = route.predicted_quality.get(route.candidate)
    return "not routed" if quality is None else f"predicted quality {quality:.3f}"


def _mean_quality(routes: Sequence[Any], candidate: str | None = None) -> str:
    values = [route.predicted_quality.get(candidate or route.candidate) for route in routes]
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"
