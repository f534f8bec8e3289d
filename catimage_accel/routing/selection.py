"""Who draws what: each candidate's share of the prompts at some points of a router's curve, also by kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from catimage_accel.routing.policy import choose_within_budget, tradeoff_for_budget
from catimage_accel.routing.table import ScoreTable

SELECTION_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Drawn:
    """Some prompts' mean cost and quality as routed, and each candidate's share of them (summing to 1)."""

    prompts: int
    cost: float
    quality: float
    rates: dict[str, float]


@dataclass(frozen=True)
class Selection:
    """One point of a curve: the tradeoff there (mean over the folds, by prompts), all prompts, and each kind's."""

    tradeoff: float
    all: Drawn
    kinds: dict[str, Drawn]


def selections(
    predicted: np.ndarray, table: ScoreTable, parts: Sequence[np.ndarray], kinds: Mapping[str, np.ndarray]
) -> dict[str, Selection]:
    """The routing at mean costs of ``SELECTION_SHARES`` of the dearest candidate's, by share ("0.25").

    ``parts`` are the rows that one router predicted each; every part keeps to the cost by itself. Shares under the
    cheapest candidate's cost are left out. ``kinds`` maps a kind to (prompts,) bools.
    """
    found = {}
    for share in SELECTION_SHARES:
        budget = share * float(table.costs.max())
        if budget < table.costs.min():
            continue
        chosen = np.empty(len(table), dtype=np.intp)
        tradeoff = 0.0
        for rows in parts:
            chosen[rows] = choose_within_budget(predicted[rows], table.costs, budget)
            tradeoff += tradeoff_for_budget(predicted[rows], table.costs, budget) * len(rows) / len(table)
        everyone = np.ones(len(table), dtype=bool)
        found[f"{share:.2f}"] = Selection(
            tradeoff,
            _drawn(chosen, table, everyone),
            {kind: _drawn(chosen, table, mask) for kind, mask in kinds.items()},
        )
    return found


def _drawn(chosen: np.ndarray, table: ScoreTable, mask: np.ndarray) -> Drawn:
    rows = np.flatnonzero(mask)
    rates = np.bincount(chosen[rows], minlength=len(table.candidates)) / len(rows)
    return Drawn(
        prompts=len(rows),
        cost=float(table.costs[chosen[rows]].mean()),
        quality=float(table.scores[rows, chosen[rows]].mean()),
        rates=dict(zip(table.candidates, rates.tolist(), strict=True)),
    )
