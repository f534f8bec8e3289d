"""From predicted quality and cost to a choice of candidate for every prompt."""

from __future__ import annotations

import math

import numpy as np

from catimage_accel.routing.table import check_costs

BUDGET_ROUNDING = 1e-12  # relative: a mean of equal costs may come out a hair above them


def choose(quality: np.ndarray, costs: np.ndarray, tradeoff: float) -> np.ndarray:
    """For every prompt the candidate that maximises ``quality - tradeoff * cost / max(costs)``.

    ``quality`` is (n, candidates), ``costs`` (candidates,); the result is (n,) positions of candidates. ``tradeoff``
    (finite, >= 0) is in quality's unit: what one is ready to lose to save the dearest candidate's cost. At 0 the
    best candidate is chosen, and the mean cost never rises as the tradeoff does. Of equals the cheapest is chosen,
    of equally cheap ones the first. The rule is that of CATImage (arXiv 2506.14753). ValueError for anything else.
    """
    quality, costs = check_quality(quality, costs)
    if not (math.isfinite(tradeoff) and tradeoff >= 0):
        raise ValueError(f"tradeoff is {tradeoff}, expected a finite number >= 0")
    return _choose(quality, costs, tradeoff)


def choose_reaching(quality: np.ndarray, costs: np.ndarray, min_quality: float) -> np.ndarray:
    """For every prompt the cheapest candidate whose predicted quality is at least ``min_quality``.

    Of equally cheap ones the best predicted; where none reaches it, the best predicted of all, of equals the cheapest.
    Shapes as in ``choose``; ``min_quality`` (finite) is in quality's unit. ValueError for anything else.
    """
    quality, costs = check_quality(quality, costs)
    if not math.isfinite(min_quality):
        raise ValueError(f"min_quality is {min_quality}, expected a finite number")
    reaching = quality >= min_quality
    price = np.where(reaching, costs[None, :], np.inf).min(axis=1, keepdims=True)
    cheapest = reaching & (costs[None, :] == price)
    return np.where(
        reaching.any(axis=1), np.argmax(np.where(cheapest, quality, -np.inf), axis=1), _choose(quality, costs, 0.0)
    )


def tradeoff_for_budget(quality: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The smallest tradeoff at which the choices for these prompts cost at most ``budget`` on average.

    ``budget`` is in the costs' unit, per image. As the tradeoff falls, the mean cost rises in jumps (one prompt's
    from candidate to candidate, or that of all prompts with the same prediction at once), so it may stay well under the
    budget: ``choose_within_budget`` spends the rest. ValueError for a budget that is NaN or under the cheapest
    candidate's cost, or without prompts.
    """
    quality, costs = check_quality(quality, costs)
    limit = check_budget(quality, costs, budget)

    def affordable(tradeoff: float) -> bool:
        return float(costs[_choose(quality, costs, tradeoff)].mean()) <= limit

    if affordable(0.0):
        return 0.0
    low, high = 0.0, max(float(np.ptp(quality)), np.finfo(np.float64).tiny)
    while not affordable(high):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return high


def choose_within_budget(quality: np.ndarray, costs: np.ndarray, budget: float, *, seed: int = 0) -> np.ndarray:
    """Choices (n,) for these prompts that cost at most ``budget`` on average, as close as they can come.

    The choices of ``tradeoff_for_budget`` come first. What they leave of the budget is then spent prompt by prompt on
    the exchanges for a better and dearer candidate that gain most predicted quality for their cost, each prompt
    exchanged at most once. Prompts that gain the same, as all do under a constant router, are taken in an order drawn
    by ``seed``: a random mix of two candidates. Errors as in ``tradeoff_for_budget``.
    """
    chosen = choose(quality, costs, tradeoff_for_budget(quality, costs, budget))
    quality, costs = check_quality(quality, costs)
    prompts = np.arange(len(chosen))
    left = check_budget(quality, costs, budget) * len(chosen) - float(costs[chosen].sum())
    extra = costs[None, :] - costs[chosen][:, None]
    gain = quality - quality[prompts, chosen][:, None]
    rows, columns = np.nonzero((gain > 0) & (extra > 0) & (extra <= left))
    if not len(rows):
        return chosen
    rate = gain[rows, columns] / extra[rows, columns]
    # Rounded, so that exchanges at the boundary, which differ by rounding alone, are drawn by lot.
    rate = np.round(rate / rate.max(), 9)
    lots = np.random.default_rng(seed).permutation(len(prompts))[rows]
    exchanged = np.zeros(len(prompts), dtype=bool)
    for i in np.lexsort((-extra[rows, columns], lots, -rate)):
        row, price = rows[i], extra[rows[i], columns[i]]
        if not exchanged[row] and price <= left:
            chosen[row], exchanged[row] = columns[i], True
            left -= price
    return chosen


def _choose(quality: np.ndarray, costs: np.ndarray, tradeoff: float) -> np.ndarray:
    cheapest_first = np.argsort(costs, kind="stable")
    value = quality - tradeoff * (costs / costs.max())
    return cheapest_first[np.argmax(value[:, cheapest_first], axis=1)]


def check_quality(quality: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64; ValueError unless quality is finite and (prompts, candidates), costs as in ``check_costs``."""
    quality, costs = np.asarray(quality, dtype=np.float64), check_costs(costs)
    if quality.ndim != 2 or quality.shape[1] != len(costs):
        raise ValueError(f"quality has shape {quality.shape}, expected (prompts, {len(costs)}) for {len(costs)} costs")
    if not np.isfinite(quality).all():
        raise ValueError(f"quality holds {quality[~np.isfinite(quality)][0]}, expected finite numbers")
    return quality, costs


def check_budget(quality: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """``budget`` and a hair; ValueError when it is NaN or under the cheapest candidate's cost, or without prompts."""
    if not len(quality):
        raise ValueError("a budget for 0 prompts, expected at least one prompt")
    if not budget >= costs.min():
        raise ValueError(f"budget is {budget}, expected at least the cheapest candidate's cost {costs.min():g}")
    return budget * (1 + BUDGET_ROUNDING)
