"""Evaluations as tables for the terminal: nothing wraps at 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from catimage_accel.cli.console import results

if TYPE_CHECKING:
    from catimage_accel.routing import Estimate, Evaluation

LEGEND = (
    "at 25%: mean quality at a mean cost of that share of the dearest candidate's; best: anywhere on the curve. "
    "regret: the oracle's mean quality over cost, less this one's. error: of the predicted quality, mean over its "
    "deciles. slope: of score on prediction, over all and (gap slope) within prompts; 1 is calibrated."
)


def print_evaluations(found: Mapping[str, Evaluation], oracle: Evaluation) -> None:
    """Two tables: what routing gains, with intervals; and where along the curve, and how well it knows."""
    console = results()
    judged = f"{oracle.prompts:,} held-out prompts, {len(oracle.candidates)} candidates"
    console.print(f"{judged}, 95% intervals in brackets\n", highlight=False)
    console.print(_gains(found, oracle), "")
    console.print(_along(found, oracle))
    console.print(LEGEND, style="dim", highlight=False)


def _gains(found: Mapping[str, Evaluation], oracle: Evaluation) -> Table:
    table = _table("router", "mean quality over cost", "gain share", "quality-neutral cost")
    for name, each in found.items():
        neutral = _interval(each.qnc, ".3f", missing="never")
        table.add_row(name, _interval(each.area), _interval(each.gain_share, "+z.3f"), neutral)
    table.add_section()
    table.add_row("best random mix", _interval(oracle.hull_area), "0", "1")
    table.add_row("oracle", _interval(oracle.area), "1", _interval(oracle.qnc, ".3f"))
    return table


def _along(found: Mapping[str, Evaluation], oracle: Evaluation) -> Table:
    shares = [f"{float(share):.0%}" for share in oracle.quality_at]
    table = _table("router", *(f"at {share}" for share in shares), "best", "regret", "error", "slope", "gap slope")
    for name, each in {**found, "oracle": oracle}.items():
        if name == "oracle":
            table.add_section()
        quality = [*each.quality_at.values(), each.max_quality]
        sums = each.calibration
        known = () if name == "oracle" else (_value(sums.expected_error, "#.2g"), _value(sums.slope, ".2f"),
                                             _value(sums.gap_slope, ".2f"))  # fmt: skip
        table.add_row(name, *(_value(one) for one in quality), _value(each.regret), *known)
    table.add_row(f"always {oracle.best_single_candidate}", "", "", "", _value(oracle.best_single))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def _interval(estimate: Estimate, form: str = "#.4g", missing: str = "-") -> Text:
    figures = (estimate.value, estimate.low, estimate.high)
    value, low, high = (missing if x is None else format(x, form) for x in figures)
    return Text.assemble((value, "bold"), (f" [{low}, {high}]", "dim"))


def _value(estimate: Estimate, form: str = "#.4g") -> str:
    return "-" if estimate.value is None else format(estimate.value, form)
