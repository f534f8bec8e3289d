"""``catimage zoo``: train the built-in catalog's models, pack them, measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train, pack and measure the models of the built-in catalog.", no_args_is_help=True)

Work = Annotated[Path | None, typer.Option(help="Where checkpoints, renderings and pieces are kept.")]


def work_folder(given: Path | None) -> Path:
    """``given``, or the user's cache folder for the zoo; created."""
    from platformdirs import user_cache_path

    folder = given or user_cache_path("catimage-accel") / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@app.command()
def train(
    part: Annotated[str, typer.Argument(help="tokenizer, autoencoder, teacher, small or judge; in this order.")],
    work: Work = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the part's own.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Train one piece; run it again after an interruption and it goes on from its last checkpoint."""
    import torch

    from catimage_accel.training.process import prepare_process
    from catimage_accel.zoo.training.parts import train_part

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no CUDA device; accepted here: cpu")
    prepare_process(threads)
    train_part(part, work_folder(work), torch.device(device), steps)


@app.command()
def pack(out: Annotated[Path, typer.Argument(help="The catalog's folder.")], work: Work = None) -> None:
    """Assemble the trained pieces into OUT/model and OUT/judge."""
    from catimage_accel.zoo.training.parts import pack as pack_pieces

    pack_pieces(work_folder(work), out)


@app.command()
def students(
    catalog: Annotated[Path, typer.Argument(help="A packed catalog folder.")],
    work: Annotated[Path, typer.Option(help="Where `catimage distill` kept its runs.")],
) -> None:
    """Pack the efficient UNet and decoder into CATALOG/model, and add the candidates that use them."""
    from catimage_accel.catalog import Catalog
    from catimage_accel.zoo.students import pack_students

    pack_students(Catalog.load(catalog, verify=False), work).write_checksums()


@app.command()
def objects(font: Annotated[Path, typer.Argument(help="NotoColorEmoji.ttf")], out: Path) -> None:
    """Draw the atlas of object pictures again, from the font."""
    from catimage_accel.zoo.objects import build_atlas

    build_atlas(font, out)


@app.command()
def prompts(
    out: Annotated[Path, typer.Argument(help="A text file, one caption a line.")],
    number: Annotated[int, typer.Option(min=1)] = 1000,
    start: Annotated[int, typer.Option(min=0, help="Skip this many first; other captions, same distribution.")] = 0,
) -> None:
    """Write captions whose noun combinations were never trained on."""
    from catimage_accel.zoo.training.data import held_out_captions

    out.write_text("".join(text + "\n" for _, text in held_out_captions(number, start)), encoding="utf-8")


@app.command()
def measure(
    catalog: Annotated[Path, typer.Argument(help="A packed catalog folder.")],
    number: Annotated[int, typer.Option(min=8, help="Held-out captions.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """The model card's figures: reconstruction, the judge on scenes and on pictures, and what steps are worth."""
    import json

    from rich.console import Console

    from catimage_accel.zoo.measure import measure_zoo

    figures = measure_zoo(catalog, number)
    Console().print_json(json.dumps(figures))
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")


@app.command()
def card(
    catalog: Annotated[Path, typer.Argument(help="A catalog folder with training.json and figures.json.")],
) -> None:
    """Write the model card from what training and measuring recorded."""
    from catimage_accel.zoo.card import write_card

    typer.echo(write_card(catalog))
