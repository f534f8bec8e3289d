"""Deferral curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from catimage_accel.routing.evaluation import Evaluation
from catimage_accel.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5e9"
COLOURS = ("#2f6fde", "#c2571a", "#0f8a73", "#8e4bbd", "#b4577a", "#8a7410")
LINE_SHARE = 0.045  # of the axes' height: one label's
NAME_SHARE = 0.2  # of the axes' width: one candidate's name


def plot_curves(
    evaluations: Mapping[str, Evaluation], path: str | Path, *, cost_unit: str = "", quality: str = "quality"
) -> None:
    """Draw the routers' curves (by name), with the best random mix, the oracle and the candidates, into an image file.

    The last three are those of the first evaluation. The file's ending sets its format (``FORMATS``); it is written
    whole or not at all. ValueError without evaluations or for another ending; ModuleNotFoundError without matplotlib.
    """
    if not evaluations:
        raise ValueError("no evaluations to plot, expected at least one")
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise ValueError(f"path is {str(path)!r}, expected a file that ends in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
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
    """Every candidate's cost and mean score as a point, its name beside it and clear of the names already there."""
    axes.scatter(found.candidate_costs, found.candidate_scores, s=22, color=MUTED, zorder=3)
    low, high = axes.get_ylim()
    step, span = LINE_SHARE * (high - low), max(found.candidate_costs) - min(found.candidate_costs)
    points = sorted(
        zip(found.candidates, found.candidate_costs, found.candidate_scores, strict=True), key=lambda each: -each[2]
    )
    placed: list[tuple[float, float]] = []
    for name, cost, score in points:
        late = cost > min(found.candidate_costs) + (1 - NAME_SHARE) * span
        # The curves come from the left: at the right end there is more room above them.
        at, away = score + (0.8 if late else -0.8) * step, (1 if late else -1) * step / 4
        while any(abs(x - cost) < NAME_SHARE * span and abs(y - at) < step for x, y in placed):
            at += away
        placed.append((cost, at))
        axes.annotate(
            name, (cost, score), xytext=(cost + (-1 if late else 1) * 0.008 * span, at), fontsize=8, color=MUTED,
            ha="right" if late else "left", va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5} if abs(at - score) > 1.5 * step else None,
        )  # fmt: skip
    heights = [y for _, y in placed]
    axes.set_ylim(min(low, min(heights) - step), max(high, max(heights) + step))


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
