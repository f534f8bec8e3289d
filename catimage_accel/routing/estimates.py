"""A figure and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure on the judged prompts, and its interval: None where it is not defined (or, for a cost, not reached)."""

    value: float | None
    low: float | None
    high: float | None


def estimate(value: float, drawn: Sequence[float], confidence: float) -> Estimate:
    """``value`` with the percentile interval of its resamples; NaN ones are passed over, infinity becomes None."""
    outer = (1 - confidence) / 2
    defined = [draw for draw in drawn if not math.isnan(draw)]
    # "higher": an interpolation towards infinity (never matched) would be NaN.
    low, high = np.quantile(defined, [outer, 1 - outer], method="higher") if defined else (math.nan, math.nan)
    return Estimate(*(float(x) if math.isfinite(x) else None for x in (value, low, high)))
