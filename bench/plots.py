"""Pictures of a file of results: how far each kernel is from the device's ceilings, and bars of times.

    python bench/plots.py bench/results/<device>/<date>.json

takes what ``bench/run.py`` and ``bench/device_check.py`` write; the pictures go beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

OURS = ("triton", "cuda")
INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5e9"
SERIES = {
    "triton": "#2f6fde", "cuda": "#12a594", "eager": "#9aa1ab", "torch.compile": "#e08b3c", "flash": "#b4577a",
    "cudnn": "#8e6bd1", "efficient": "#c9a227", "xformers": "#6f8f3a",
}  # fmt: skip
MARKERS = {"attention": "o", "group_norm": "s", "layer_norm": "^", "geglu": "D", "guided_step": "v"}


def roofline(rows: Rows, facts: dict[str, Any]) -> Figure | None:
    """Our best time of every workload under the measured copy bandwidth and matrix rate, where they are known."""
    ceilings = facts.get("ceilings")
    if not ceilings:
        return None
    figure, axes = _new(7.5, 4.8)
    copy, matmul = ceilings["copy_gb_s"] / 1e3, ceilings["matmul_tflop_s"]["torch.float16"]
    intensity = np.geomspace(0.1, 4000, 200)
    axes.plot(intensity, np.minimum(intensity * copy, matmul), color=INK, linewidth=1.4)
    axes.annotate(
        f"copy {copy:.2f} TB/s, float16 products {matmul:.0f} TFLOP/s", (0.12, matmul), color=MUTED, va="bottom"
    )
    for op, marker in MARKERS.items():
        points = []
        for row in rows:
            ours = [row["implementations"].get(name, {}) for name in OURS if row["op"] == op]
            best = min((one for one in ours if one.get("gb_s")), key=lambda one: one["ms"], default=None)
            if best:
                points.append((1e3 * best["tflop_s"] / best["gb_s"], best["tflop_s"]))
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=30, alpha=0.8, linewidths=0, label=op)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axes.legend(frameon=False, loc="lower right")
    return _titled(figure, axes, "Our kernels under the measured ceilings", facts)


def kernel_bars(rows: Rows, facts: dict[str, Any]) -> Figure | None:
    """Each op's implementations: how many times as fast as eager, the geometric mean over workloads that both ran."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        ran = {name: found["ms"] for name, found in row["implementations"].items() if "ms" in found}
        for name, ms in ran.items():
            if "eager" in ran and name != "eager":
                ratios.setdefault(row["op"], {}).setdefault(name, []).append(ran["eager"] / ms)
    if not ratios:
        return None
    bars = [
        (f"{op}: {name}, {len(found[name])} workloads", float(np.exp(np.mean(np.log(found[name])))), SERIES[name])
        for op, found in ratios.items()
        for name in SERIES
        if name in found
    ]
    figure, axes = _new(7.5, 0.8 + 0.32 * len(bars))
    _bars(axes, bars, "{:.2f}x")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlabel("times as fast as eager, geometric mean")
    return _titled(figure, axes, "Kernels against what there is", facts)


def end_to_end_bars(
    title: str, size: Callable[[dict[str, Any]], str]
) -> Callable[[Rows, dict[str, Any]], Figure | None]:
    """Milliseconds of every variant, a panel a size."""

    def draw(rows: Rows, facts: dict[str, Any]) -> Figure | None:
        sizes: dict[str, Rows] = {}
        for row in rows:
            if "ms" in row:
                sizes.setdefault(size(row), []).append(row)
        if not sizes:
            return None
        heights = [len(found) for found in sizes.values()]
        figure, panels = plt.subplots(
            len(sizes), 1, figsize=(7.5, 0.9 * len(sizes) + 0.3 * sum(heights)), squeeze=False,
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        for axes, (name, found) in zip(panels[:, 0], sizes.items(), strict=True):
            _quiet(axes)
            ours = [SERIES["triton"] if "accelerate" in row["variant"] else SERIES["eager"] for row in found]
            _bars(axes, [(row["variant"], row["ms"], ink) for row, ink in zip(found, ours, strict=True)], "{:.1f} ms")
            axes.set_title(name, loc="left", fontsize=9, color=MUTED)
        return _titled(figure, panels[0, 0], title, facts)

    return draw


PLOTS: dict[str, tuple[str, Callable[[Rows, dict[str, Any]], Figure | None]]] = {
    "roofline": ("kernels", roofline),
    "kernels": ("kernels", kernel_bars),
    "unet": ("unet", end_to_end_bars("One UNet call", lambda row: f"{row['model']}, {row['rows']} rows")),
    "pipeline": (
        "pipeline",
        end_to_end_bars(
            "Images with their decoding", lambda row: f"{row['model']}, {row['steps']} steps, {row['images']} images"
        ),
    ),
}


def draw_all(path: Path) -> list[Path]:
    """Every plot that the file of results has figures for, as ``<plot>.png`` beside it."""
    results = json.loads(path.read_text())
    if "stages" in results:  # of device_check.py
        results["kernels"] = results["stages"].get("benchmarks", {}).get("rows", [])
    written = []
    for name, (key, draw) in PLOTS.items():
        figure = draw(results.get(key, []), results["about"])
        if figure is not None:
            written.append(path.with_name(f"{name}.png"))
            figure.savefig(written[-1], dpi=150)
            plt.close(figure)
    return written


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    _quiet(axes)
    return figure, axes


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.6)


def _bars(axes: Axes, bars: list[tuple[str, float, str]], label: str) -> None:
    names, lengths, colours = zip(*bars, strict=True)
    drawn = axes.barh(np.arange(len(bars)), lengths, color=colours, height=0.66)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # a label may lie on the line at 1
    axes.bar_label(drawn, [label.format(length) for length in lengths], padding=3, fontsize=8, color=INK, bbox=paper)
    axes.set_yticks(np.arange(len(bars)), names)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")


def _titled(figure: Figure, axes: Axes, title: str, facts: dict[str, Any]) -> Figure:
    small = ", small stand-ins" if facts.get("small_cpu_run") else ""
    where = f"{facts['device']}{small}, torch {facts['torch']}, {facts['date'][:10]}"
    figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", fontsize=10, color=INK)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(*draw_all(parser.parse_args().results), sep="\n")
