"""CMMD against its definition, computed pair by pair, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from catimage_accel.quality import CMMD, CLIPScore, SetMetric


class Pixels:
    """Features that are handed in as they are, one row an image."""

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(images)


def cmmd(left: np.ndarray, right: np.ndarray) -> float:
    return CMMD(Pixels()).compare(list(left), list(right))


def kernel(one: np.ndarray, other: np.ndarray) -> float:
    return math.exp(-float(np.square(one - other).sum()) / (2 * 10**2))


def pair_by_pair(left: np.ndarray, right: np.ndarray) -> float:
    def mean(these: np.ndarray, those: np.ndarray) -> float:
        return sum(kernel(one, other) for one in these for other in those) / (len(these) * len(those))

    return 1000 * (mean(left, left) + mean(right, right) - 2 * mean(left, right))


def sets() -> st.SearchStrategy[np.ndarray]:
    def rows(number: int) -> st.SearchStrategy[np.ndarray]:
        found = arrays(np.float64, (number, 3), elements=st.floats(-10, 10, width=32))
        return found.filter(lambda features: bool((np.abs(features).max(axis=1) > 1e-3).all()))

    return st.integers(2, 6).flatmap(rows)


@settings(max_examples=60, deadline=None)
@given(left=sets(), right=sets())
def test_it_is_the_biased_estimate_of_the_definition(left: np.ndarray, right: np.ndarray) -> None:
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right))
    found = cmmd(left, right)
    assert found == pytest.approx(pair_by_pair(ours, theirs), abs=1e-9)
    assert found == pytest.approx(cmmd(right, left), abs=1e-12)
    assert cmmd(left, left[::-1]) == pytest.approx(0, abs=1e-12)
    low, high = CMMD.range
    assert low <= found <= high


@pytest.mark.parametrize(
    ("angle", "scale"),
    [
        pytest.param(math.pi, 1.0, id="opposite-is-the-top-of-the-range"),
        pytest.param(math.pi / 2, 1.0, id="right-angle"),
        pytest.param(1e-5, 1.0, id="so-near-that-1-minus-a-kernel-would-cancel"),
        pytest.param(math.pi / 2, 30.0, id="length-does-not-matter"),
    ],
)
def test_two_points(angle: float, scale: float) -> None:
    left = np.tile([1.0, 0.0], (3, 1))
    right = np.tile([scale * math.cos(angle), scale * math.sin(angle)], (2, 1))
    squared = 4 * math.sin(angle / 2) ** 2
    expected = -2000 * math.expm1(-squared / 200)
    assert cmmd(left, right) == pytest.approx(expected, rel=1e-5)
    assert cmmd(left, right) <= CMMD.range[1] * (1 + 1e-12)


def test_sets_larger_than_a_block_of_rows() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2500, 2)), rng.normal(size=(3, 2))
    whole = cmmd(left, right)
    assert whole == pytest.approx(cmmd(np.tile(left, (2, 1)), right), rel=1e-9), "the same set twice is the same set"


def test_too_small_sets_are_named(clip_folder: Path, images: list[Image.Image]) -> None:
    metric: SetMetric = CMMD(CLIPScore(clip_folder))
    with pytest.raises(ValueError, match="references has 1 image, expected at least 2"):
        metric.compare(images, images[:1])
    with pytest.raises(ValueError, match="image 1 is 'cat'"):
        metric.compare([images[0], "cat"], images)  # type: ignore[list-item]


def test_clips_features_tell_other_pictures_apart(clip_folder: Path, images: list[Image.Image]) -> None:
    metric = CMMD(CLIPScore(clip_folder))
    dark = [image.point(lambda value: value // 4) for image in images]
    assert metric.compare(images, images[::-1]) == pytest.approx(0, abs=1e-9)
    assert metric.compare(images, dark) > 1e-3
    assert (metric.name, metric.higher_is_better) == ("cmmd", False)
