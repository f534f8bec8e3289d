"""Kinds of prompts, told by their words: how much is asked for, and how."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from catimage_accel.routing.counts import CountFeatures

AMOUNTS = ("no counted thing", "one thing", "two things", "three things", "four or more things")
TRAITS = {"negation": "negations", "comparison": "comparisons", "spatial": "spatial"}


def prompt_kinds(prompts: Sequence[str], kinds: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Which prompts are of which kind, (n,) bools a kind; kinds without prompts are left out.

    With ``kinds``, one word a prompt, those are the kinds ("" is none). Else each prompt is of one of ``AMOUNTS``, by
    the things that ``CountFeatures`` counts (articles, and numbers by their value), and of any of ``TRAITS`` whose
    words it holds.
    """
    found: dict[str, np.ndarray] = {}
    if kinds is not None:
        words = np.array(kinds, dtype=object)
        found = {word: words == word for word in sorted(set(kinds)) if word}
    else:
        counts = dict(zip(CountFeatures.NAMES, np.rint(np.expm1(CountFeatures().embed(prompts))).T, strict=True))
        amounts = np.minimum(counts["things"], len(AMOUNTS) - 1)
        found = {name: amounts == amount for amount, name in enumerate(AMOUNTS)}
        found |= {trait: counts[column] > 0 for trait, column in TRAITS.items()}
    return {kind: mask for kind, mask in found.items() if mask.any()}
