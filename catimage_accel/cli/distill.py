"""``catimage distill``: SnapFusion's recipes, run from a file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.cli.console import loading, say

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Make cheap candidates: an efficient UNet, a pruned decoder, students that need few steps (SnapFusion).",
    no_args_is_help=True,
)

Recipe = Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped recipe, such as student-8.")]
Work = Annotated[Path | None, typer.Option(help="Where checkpoints, latents and results are kept.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; under `accelerate launch` each process has its own.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")]


@app.command()
def architecture(
    recipe: Recipe, work: Work = None, steps: Steps = None, device: Device = "cpu", threads: Threads = 0
) -> None:
    """Train the teacher's blocks to do without each other, and search for the fewest that still draw well."""
    from catimage_accel.snapfusion.evolution import search_architecture

    _run(search_architecture, recipe, work, steps, device, threads)


@app.command()
def decoder(
    recipe: Recipe, work: Work = None, steps: Steps = None, device: Device = "cpu", threads: Threads = 0
) -> None:
    """Prune an image decoder and train it to match the whole one on latents that the model draws."""
    from catimage_accel.snapfusion.decoder import distill_decoder_recipe

    _run(distill_decoder_recipe, recipe, work, steps, device, threads)


@app.command()
def finetune(
    recipe: Recipe, work: Work = None, steps: Steps = None, device: Device = "cpu", threads: Threads = 0
) -> None:
    """Train a UNet on v, on pictures with captions."""
    from catimage_accel.snapfusion.distill import finetune as train

    _run(train, recipe, work, steps, device, threads)


@app.command("steps")
def distill_steps(
    recipe: Recipe, work: Work = None, steps: Steps = None, device: Device = "cpu", threads: Threads = 0
) -> None:
    """Teach a UNet to take fewer steps than its teacher."""
    from catimage_accel.snapfusion.distill import distill_steps as train

    _run(train, recipe, work, steps, device, threads)


def _run(
    train: Callable[[Path, Path, torch.device, int | None], Path],
    recipe: Path, work: Path | None, steps: int | None, device: str, threads: int,
) -> None:  # fmt: skip
    """A run that Ctrl-C, or SIGTERM, ends with a checkpoint; the same command then goes on."""
    from platformdirs import user_cache_path

    from catimage_accel.arguments import find_device
    from catimage_accel.snapfusion.recipes import find_recipe
    from catimage_accel.training.process import prepare_process

    found = find_recipe(recipe)
    prepare_process(threads)
    with loading(f"recipe {found.stem}"):
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it warns whenever a model changes its type, which training does on purpose
    folder = work or user_cache_path("catimage-accel") / "distill"
    folder.mkdir(parents=True, exist_ok=True)
    say(f"written to {train(found, folder, find_device(device), steps)}")
