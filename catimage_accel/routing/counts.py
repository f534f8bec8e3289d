"""Counts that say how much a prompt asks for: features a person can read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from catimage_accel.routing.table import check_prompts

NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "dozen": 12,
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
JOINTS = {"and", "with", "plus", "&", ","}
NEGATIONS = {
    "no", "not", "without", "never", "nothing", "none", "neither", "nor", "isn't", "aren't", "doesn't", "don't",
}  # fmt: skip
COMPARISONS = {
    "than", "more", "less", "fewer", "most", "least", "same", "different", "equal", "larger", "smaller", "bigger",
    "taller", "all",
}  # fmt: skip
SPATIAL = {
    "left", "right", "above", "below", "over", "under", "between", "behind", "beside", "near", "next", "top", "bottom",
    "front", "inside", "outside", "on", "in",
}  # fmt: skip
COLOURS = {
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray", "gold",
    "golden", "silver", "beige",
}  # fmt: skip
MAX_NUMBER = 100  # a year or a resolution is not a number of things
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[,&]")


class LogCounts:
    """Counts of a prompt, ``NAMES`` the columns, as ``log(1 + count)``: (n, columns) float32, each >= 0."""

    KIND: str
    NAMES: tuple[str, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        return (len(self.NAMES),)

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        check_prompts(prompts)
        counts = np.array([self.counts(prompt) for prompt in prompts], dtype=np.float32)
        return np.log1p(counts.reshape(len(prompts), len(self.NAMES)))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND}

    def counts(self, prompt: str) -> list[int]:
        """One number a column."""
        raise NotImplementedError


def folded(prompt: str) -> str:
    """The text in which words and marks are looked for."""
    return unicodedata.normalize("NFKC", prompt).casefold().replace("\u2019", "'")


class CountFeatures(LogCounts):
    """Ten counts of a prompt's words, as ``log(1 + count)``: (n, 10) float32, each >= 0.

    In order (``NAMES``): words, characters, things asked for (articles plus number words and digits by their value),
    number words, joints (commas, and, with), negations, comparisons, spatial words, colours, and different words. The
    lists are English; in other scripts the lengths still count.
    """

    KIND = "counts"
    NAMES = ("words", "characters", "things", "numbers", "joints", "negations", "comparisons", "spatial", "colours",
             "different words")  # fmt: skip

    def counts(self, prompt: str) -> list[int]:
        words = WORD.findall(folded(prompt))
        values = [value for word in words if (value := _value(word)) is not None]

        def among(listed: set[str]) -> int:
            return sum(word in listed for word in words)

        spoken = [word for word in words if word not in ",&"]
        return [
            len(spoken),
            len(prompt),
            among(ARTICLES) + sum(values),
            len(values),
            among(JOINTS),
            among(NEGATIONS),
            among(COMPARISONS),
            among(SPATIAL),
            among(COLOURS),
            len(set(spoken)),
        ]


def _value(word: str) -> int | None:
    if word.isdecimal():
        return min(int(word[:4]), MAX_NUMBER) if word.isascii() else 1
    return NUMBERS.get(word)
