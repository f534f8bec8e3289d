"""``catimage distill``: recipes, run from a file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catimage_accel.cli.console import loading, say

if TYPE_CHECKING:
    from catimage_accel.ray_training import Train

app = typer.Typer(
    help="Make cheap candidates: an efficient UNet, a pruned decoder, students that need few steps or no guidance.",
    no_args_is_help=True,
)

Recipes = Annotated[
    list[Path], typer.Argument(help="TOML files, or names of shipped recipes, such as student-8; one after another.")
]
Work = Annotated[Path | None, typer.Option(help="Where checkpoints, latents and results are kept.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; under `accelerate launch` each process has its own.")]
Ray = Annotated[
    bool,
    typer.Option("--ray", help="All recipes at once with Ray, on this machine or its cluster: a GPU each, if any."),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")]


def _command(name: str) -> Callable[[Callable[[], Train]], Callable[[], Train]]:
    """Makes command ``name`` of a function that imports what trains; its docstring is the command's help."""

    def register(load: Callable[[], Train]) -> Callable[[], Train]:
        def command(
            recipes: Recipes,
            work: Work = None,
            steps: Steps = None,
            device: Device = "cpu",
            threads: Threads = 0,
            ray: Ray = False,
        ) -> None:
            _run(load(), recipes, work, steps, device, threads, ray)

        app.command(name, help=load.__doc__)(command)
        return load

    return register


@_command("architecture")
def _architecture() -> Train:
    """Train the teacher's blocks to do without each other, and search for the fewest that still draw well."""
    from catimage_accel.snapfusion.evolution import search_architecture

    return search_architecture


@_command("decoder")
def _decoder() -> Train:
    """Prune an image decoder and train it to match the whole one on latents that the model draws."""
    from catimage_accel.snapfusion.decoder import distill_decoder_recipe

    return distill_decoder_recipe


@_command("finetune")
def _finetune() -> Train:
    """Train a UNet on v, on pictures with captions."""
    from catimage_accel.snapfusion.distill import finetune

    return finetune


@_command("steps")
def _steps() -> Train:
    """Teach a UNet to take fewer steps than its teacher."""
    from catimage_accel.snapfusion.distill import distill_steps

    return distill_steps


@_command("guidance")
def _guidance() -> Train:
    """Teach a UNet to draw without guidance, at half the cost, what its teacher draws with it."""
    from catimage_accel.snapfusion.distill import distill_guidance

    return distill_guidance


def _run(
    train: Train, recipes: list[Path], work: Path | None, steps: int | None, device: str, threads: int, ray: bool
) -> None:
    """Runs that Ctrl-C, or SIGTERM, ends with a checkpoint; the same command then goes on."""
    from platformdirs import user_cache_path

    from catimage_accel.arguments import find_device
    from catimage_accel.snapfusion.recipes import find_recipe
    from catimage_accel.training.process import prepare_process

    found = [find_recipe(recipe) for recipe in recipes]
    names = [path.stem for path in found]
    if len(set(names)) < len(names):
        raise ValueError(f"recipes are {', '.join(names)}; accepted: names that differ, for results are kept by them")
    folder = (work or user_cache_path("catimage-accel") / "distill").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if ray:
        from catimage_accel.ray_cluster import connect
        from catimage_accel.ray_training import train_on_ray

        with connect(), loading(", ".join(names)):
            for result in train_on_ray(train, [path.absolute() for path in found], folder, steps, threads):
                say(f"written to {result}")
        return
    where = find_device(device)
    for path in found:
        with loading(f"recipe {path.stem}"):
            prepare_process(threads)
        say(f"written to {train(path, folder, where, steps)}")
