"""Deferral curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catimage_accel.routing.evaluation import Evaluation
from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5e9"
COLOURS = ("#2f6fde", "#c2571a", "#0f8a73", "#8e4bbd", "#b4577a", "#8a7410")
LINE_SHARE = 0.045  # of the axes' height: one label's
NAME_SHARE = 0.2  # of the axes' width: one candidate's name
LOG_FROM = 8.0  # times the cheapest candidate's cost: dearest ones from here on make the axis of costs logarithmic


def plot_curves(
    evaluations: Mapping[str, Evaluation], path: str | Path, *, cost_unit: str = "", quality: str = "quality"
) -> None:
    """Draw the routers' curves (by name), with the best random mix, the oracle and the candidates, into an image file.

    The last three are those of the first evaluation; candidates that another beats at their cost or less are hollow and
    have no name. The file's ending sets its format (``FORMATS``); it is written whole or not at all. ValueError without
    evaluations or for another ending; ModuleNotFoundError without matplotlib.
    """
    if not evaluations:
        raise ValueError("no evaluations to plot, expected at least one")
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise ValueError(f"path is {str(path)!r}, expected a file that ends in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install catimage-accel[plots]") from error
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(evaluations.values()))
    axes.plot(first.costs, first.oracle, color=MUTED, linewidth=1.2, linestyle=":")
    axes.plot(first.costs, first.hull, color=MUTED, linewidth=1.2, linestyle="--")
    ends = [("oracle: true scores", first.oracle, MUTED), ("best random mix", first.hull, MUTED)]
    for number, (name, found) in enumerate(evaluations.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(found.costs, found.curve, color=colour, linewidth=2)
        share = "" if found.gain_share.value is None else f", gain share {found.gain_share.value:+z.2f}"
        ends.append((f"{name}{share}", found.curve, colour))
    dearest, cheapest = max(first.candidate_costs), min(first.candidate_costs)
    if cheapest > 0 and dearest >= LOG_FROM * cheapest:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    _candidates(axes, first)
    _frame(axes)
    _label_ends(axes, ends)
    axes.set_xlabel(f"mean cost an image{f' ({cost_unit})' if cost_unit else ''}", color=INK)
    axes.set_ylabel(f"mean {quality}", color=INK)
    axes.set_title(f"Quality against cost on {first.prompts:,} held-out prompts", loc="left", color=INK)
    content = io.BytesIO()
    figure.savefig(content, format=ending[1:], dpi=150)
    write_atomic(Path(path), content.getvalue())


def _candidates(axes: Axes, found: Evaluation) -> None:
    """Every candidate's cost and mean score as a point.

    Those that no other beats at their cost or less are full and have their names beside them, clear of each other; the
    others are hollow.
    """
    points = sorted(
        zip(found.candidates, found.candidate_costs, found.candidate_scores, strict=True), key=lambda each: -each[2]
    )
    best = [one for one in points if not any(_beats(other, one) for other in points)]
    beaten = [one for one in points if one not in best]
    axes.scatter([cost for _, cost, _ in best], [score for *_, score in best], s=22, color=MUTED, zorder=4)
    axes.scatter(
        [cost for _, cost, _ in beaten], [score for *_, score in beaten], s=16, facecolors="white", edgecolors=MUTED,
        linewidths=0.8, zorder=4,
    )  # fmt: skip
    low, high = axes.get_ylim()
    step = LINE_SHARE * (high - low)
    scale = np.log if axes.get_xscale() == "log" else np.asarray
    left, right = (float(scale(end(found.candidate_costs))) for end in (min, max))
    placed: list[tuple[float, float]] = []
    for name, cost, score in best:
        place = (float(scale(cost)) - left) / ((right - left) or 1)
        late = place > 1 - NAME_SHARE
        # The curves come from the left: at the right end there is more room above them.
        at, away = score + (0.8 if late else -0.8) * step, (1 if late else -1) * step / 4
        while any(abs(x - place) < NAME_SHARE and abs(y - at) < step for x, y in placed):
            at += away
        placed.append((place, at))
        axes.annotate(
            name, (cost, score), xytext=(-6 if late else 6, at), textcoords=("offset points", "data"), fontsize=8,
            color=MUTED, ha="right" if late else "left", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5} if abs(at - score) > 1.5 * step else None,
        )  # fmt: skip
    heights = [y for _, y in placed]
    axes.set_ylim(min(low, min(heights) - step), max(high, max(heights) + step))


def _beats(other: tuple[str, float, float], one: tuple[str, float, float]) -> bool:
    """Whether ``other`` is no dearer and no worse, and one of the two better."""
    return other[1] <= one[1] and other[2] >= one[2] and other[1:] != one[1:]


End = tuple[str, Sequence[float], str]


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Names at the right of the curves' ends; those that lie close are pushed apart, the better curve on top."""
    low, high = axes.get_ylim()
    step = LINE_SHARE * (high - low)
    blocks: list[list[End]] = []
    for end in sorted(ends, key=lambda end: end[1][-1]):
        blocks.append([end])
        while len(blocks) > 1 and _middle(blocks[-1]) - _middle(blocks[-2]) < step * len(blocks[-1] + blocks[-2]) / 2:
            last = blocks.pop()
            blocks[-1] += last
    for block in blocks:
        start = _middle(block) - step * (len(block) - 1) / 2
        for i, (name, _, colour) in enumerate(sorted(block, key=lambda end: sum(end[1]))):
            axes.annotate(
                name, (1.01, start + step * i), xycoords=("axes fraction", "data"), color=colour, fontsize=9,
                va="center", annotation_clip=False,
            )  # fmt: skip


def _middle(block: Sequence[End]) -> float:
    return sum(curve[-1] for _, curve, _ in block) / len(block)


def _frame(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
