"""Which candidate draws a request: the catalog's router, held to load, deadline and what can be drawn at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from catimage_accel.arguments import check_budget
from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.choosing import Chooser, Policy, choose_by
from catimage_accel.routing import tradeoff_for_budget

__all__ = ["Choice", "Reason", "Routes"]

MAX_PRESSURE_COST = 1.1
"""What a prompt costs on average at the greatest tradeoff that load makes, by the cheapest candidate's cost."""

Reason = Literal["tradeoff", "budget", "min_quality", "candidate", "load", "deadline", "retry"]


@dataclass(frozen=True)
class Choice:
    """The candidate, why it, and the tradeoff it was chosen by (None where none was)."""

    candidate: Candidate
    reason: Reason
    tradeoff: float | None = None


class Routes:
    """Routes one prompt at a time. ``metric`` and costs are the catalog's; without a router only named candidates."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.costs = catalog.costs
        self.routed = (catalog.folder / "router").is_dir()
        self._chooser = Chooser(catalog)
        self.max_tradeoff = self._find_max_tradeoff()

    @property
    def dearest(self) -> float:
        return max(self.costs.values())

    def choose(self, prompt: str, policy: Policy, without: Collection[str] = ()) -> tuple[Choice, dict[str, float]]:
        """By the policy alone, among all candidates but ``without``, with every candidate's predicted quality (empty
        without a router).

        ValueError for a policy that can't be followed.
        """
        if policy.candidate is None and not self.routed:
            raise ValueError(f"catalog {self.catalog.name!r} has no router; name a candidate: {', '.join(self.costs)}")
        [(candidate, predicted)] = self._chooser.choose([prompt], policy)
        reason: Reason = "tradeoff"
        for name in ("budget", "min_quality", "candidate"):
            if getattr(policy, name) is not None:
                reason = name  # type: ignore[assignment]
        tradeoff = (
            (self.catalog.tradeoff if policy.tradeoff is None else policy.tradeoff) if reason == "tradeoff" else None
        )
        if reason != "candidate" and candidate.name in without:
            names = [name for name in self.costs if name not in without]
            check_budget(policy.budget, {name: self.costs[name] for name in names}, self.catalog.cost_unit)
            candidate = self.catalog.candidate(self._among(names, predicted, policy, tradeoff or 0.0))
        return Choice(candidate, reason, tradeoff), predicted

    def adjust(
        self,
        first: Choice,
        predicted: Mapping[str, float],
        *,
        pressure: Callable[[float], float] | None = None,
        seconds_left: float | None = None,
        seconds: Mapping[str, float] | None = None,
        without: Collection[str] = (),
    ) -> Choice:
        """The choice under what the moment asks for; ``first`` where it asks for nothing.

        ``pressure`` is what the load makes of a tradeoff: it never makes a choice dearer, and leaves a minimum quality
        alone.
        With ``seconds_left``, only candidates that take no more ``seconds`` are chosen, the quickest if none does.
        ``without`` are candidates that can't be had; a candidate that the client named is kept whatever happens.
        """
        if first.reason == "candidate" or not predicted:
            return first
        names = [name for name in self.costs if name not in without]
        if not names:
            return first
        allowed, reason, tradeoff = names, first.reason, first.tradeoff
        if seconds_left is not None and seconds is not None and seconds.get(first.candidate.name, 0.0) > seconds_left:
            fitting = [name for name in names if seconds.get(name, 0.0) <= seconds_left]
            allowed = fitting or [min(names, key=lambda name: seconds.get(name, 0.0))]
            reason = "deadline"
        if pressure is not None and first.reason in ("tradeoff", "budget"):
            asked = tradeoff or 0.0
            if (raised := pressure(asked)) > asked:
                tradeoff = raised
        chosen = first.candidate.name
        if tradeoff is not None:
            chosen = self._best(predicted, allowed, tradeoff)
            if first.reason == "budget" and self.costs[chosen] > self.costs[first.candidate.name]:
                chosen = first.candidate.name
        if chosen not in allowed:
            # What the policy chose can't be had: the best that costs no more, else the cheapest that can.
            cheaper = [name for name in allowed if self.costs[name] <= self.costs[chosen]]
            chosen = self._best(predicted, cheaper, 0.0) if cheaper else min(allowed, key=lambda name: self.costs[name])
        if chosen == first.candidate.name:
            return first
        if reason == first.reason:
            retried = first.candidate.name in without
            reason = "retry" if retried else "load"
        return Choice(self.catalog.candidate(chosen), reason, tradeoff)

    def cheaper_than(self, name: str, without: Collection[str]) -> Candidate | None:
        """The next cheaper candidate, None if there is none."""
        cheaper = [one for one, cost in self.costs.items() if cost < self.costs[name] and one not in without]
        return self.catalog.candidate(max(cheaper, key=lambda one: self.costs[one])) if cheaper else None

    def _best(self, predicted: Mapping[str, float], names: list[str], tradeoff: float) -> str:
        return self._among(names, predicted, Policy(), tradeoff)

    def _among(self, names: list[str], predicted: Mapping[str, float], policy: Policy, tradeoff: float) -> str:
        """What the policy chooses where there are only these; by ``tradeoff`` where it is one of a tradeoff or none."""
        quality = np.array([[predicted[name] for name in names]])
        costs = np.array([self.costs[name] for name in names])
        # The tradeoff is by the dearest candidate of all, which may not be among these.
        scaled = tradeoff * (float(costs.max()) / self.dearest)
        return names[int(choose_by(policy, quality, costs, scaled)[0])]

    def _find_max_tradeoff(self) -> float:
        """The tradeoff at which the profiled prompts cost a tenth more than the cheapest candidate.

        Not that of the cheapest alone: where one is a little cheaper and much worse, it would be many times as great.
        """
        if not self.routed or len(self.costs) < 2:
            return 0.0
        try:
            prompts = self.catalog.ratings().prompts
        except FileNotFoundError:
            return 1.0
        quality = self._chooser.router().predict(prompts)
        costs = np.array(list(self.costs.values()))
        return tradeoff_for_budget(quality, costs, MAX_PRESSURE_COST * float(costs.min()))
