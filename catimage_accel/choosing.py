"""From a call's policy to every prompt's candidate, by a catalog's router and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from catimage_accel.arguments import check_budget, check_min_quality, check_one_of, check_tradeoff
from catimage_accel.catalog import Candidate, Catalog

if TYPE_CHECKING:
    from catimage_accel.routing import BudgetPacer, Router


@dataclass(frozen=True)
class Policy:
    """What a call asks of its routes, as in ``RoutedPipeline``: one of four, or none for the catalog's own tradeoff."""

    tradeoff: float | None = None
    budget: float | BudgetPacer | None = None
    min_quality: float | None = None
    candidate: str | None = None

    def trial(self) -> Policy:
        """The same policy, whose choices are charged to no pacer."""
        pacer = self.pacer
        return self if pacer is None else replace(self, budget=pacer.copy())

    def charge(self, trial: Policy) -> None:
        """Charge the pacer, if there is one, with what ``trial`` chose."""
        if self.pacer is not None and trial.pacer is not None:
            self.pacer.update(trial.pacer)

    @property
    def pacer(self) -> BudgetPacer | None:
        """The budget, if it is one of a stream."""
        from catimage_accel.routing import BudgetPacer

        return self.budget if isinstance(self.budget, BudgetPacer) else None


def choose_by(policy: Policy, quality: np.ndarray, costs: np.ndarray, tradeoff: float) -> np.ndarray:
    """What a policy without a pacer chooses, as ``routing.choose``; by ``tradeoff`` where it asks for no budget and no
    quality. Budgets are to be checked before."""
    from catimage_accel.routing import choose, choose_reaching, choose_within_budget

    if policy.budget is not None:
        return choose_within_budget(quality, costs, cast(float, policy.budget))
    if policy.min_quality is not None:
        return choose_reaching(quality, costs, policy.min_quality)
    return choose(quality, costs, tradeoff)


class Chooser:
    """Chooses candidates of ``catalog``; its router is loaded when first needed."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._router: Router | None = None

    def choose(
        self, prompts: Sequence[str], policy: Policy, images: int = 1
    ) -> list[tuple[Candidate, dict[str, float]]]:
        """Every prompt's candidate, of which ``images`` are drawn, and the quality predicted for each candidate.

        ValueError for a policy of two, or a wrong one, naming it; FileNotFoundError without the router it needs.
        """
        check_one_of(
            tradeoff=policy.tradeoff, budget=policy.budget, min_quality=policy.min_quality, candidate=policy.candidate
        )
        check_tradeoff(policy.tradeoff)
        check_min_quality(policy.min_quality)
        costs = self.catalog.costs
        names, array = list(costs), np.array(list(costs.values()))
        pacer = policy.pacer
        if pacer is not None:
            pacer.check_costs(array)
        else:
            check_budget(policy.budget, costs, self.catalog.cost_unit)
        if policy.candidate is not None:
            fixed = self.catalog.candidate(policy.candidate)
            if not (self.catalog.folder / "router").is_dir():
                return [(fixed, {})] * len(prompts)
        quality = self.router().predict(prompts)
        if policy.candidate is not None:
            chosen = np.full(len(prompts), names.index(policy.candidate))
        elif pacer is not None:
            chosen = pacer.choose(quality, images=images)
        else:
            own = self.catalog.tradeoff if policy.tradeoff is None else policy.tradeoff
            chosen = choose_by(policy, quality, array, own)
        return [
            (self.catalog.candidates[index], dict(zip(names, row.tolist(), strict=True)))
            for index, row in zip(chosen.tolist(), quality, strict=True)
        ]

    def router(self) -> Router:
        """The catalog's router; errors as in ``Catalog.router``."""
        if self._router is None:
            self._router = self.catalog.router()
        return self._router

    def pacer(self, budget: float, horizon: float) -> BudgetPacer:
        """As ``RoutedPipeline.pacer``."""
        from catimage_accel.routing import BudgetPacer

        check_budget(budget, self.catalog.costs, self.catalog.cost_unit)
        quality = self.router().predict(self.catalog.ratings().prompts)
        return BudgetPacer(quality, np.array(list(self.catalog.costs.values())), budget, horizon=horizon)
