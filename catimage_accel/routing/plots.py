"""Deferral curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from catimage_accel.routing.evaluation import Evaluation


def plot_curves(
    evaluations: Mapping[str, Evaluation], path: str | Path, *, cost_unit: str = "", quality: str = "quality"
) -> None:
    """Draw the routers' curves (by name), with the best random mix and the oracle of the first, into an image file.

    The file's ending sets its format (.png, .svg, .pdf). ValueError without evaluations; ModuleNotFoundError without
    matplotlib.
    """
    if not evaluations:
        raise ValueError("no evaluations to plot, expected at least one")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install catimage-accel[plots]") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(evaluations.values()))
    axes.plot(first.costs, first.oracle, color="0.6", linestyle=":", label="oracle (true scores)")
    axes.plot(first.costs, first.hull, color="0.3", linestyle="--", label="best random mix")
    for name, found in evaluations.items():
        share = "" if found.gain_share.value is None else f", gain share {found.gain_share.value:.2f}"
        axes.plot(found.costs, found.curve, linewidth=2, label=f"{name}{share}")
    axes.set_xlabel(f"mean cost an image{f' ({cost_unit})' if cost_unit else ''}")
    axes.set_ylabel(f"mean {quality}")
    axes.set_title(f"Quality against cost on {first.prompts:,} held-out prompts")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
