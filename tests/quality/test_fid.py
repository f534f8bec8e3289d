"""FID against closed forms; a stand-in embedder takes the features from the pictures' pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from catimage_accel.quality import FID, CLIPScore, SetMetric


class Pixels:
    """Features that are handed in as they are, one row an image."""

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(images)


def fid(left: np.ndarray, right: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FID(Pixels()).compare(list(left), list(right))


def with_moments(mean: np.ndarray, covariance: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(number, len(mean)))
    rows -= rows.mean(axis=0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return rows @ np.linalg.cholesky(covariance).T + mean


def sets(most: int = 8) -> st.SearchStrategy[np.ndarray]:
    rows = st.integers(2, most)
    return rows.flatmap(lambda n: arrays(np.float64, (n, 4), elements=st.floats(-100, 100, width=32)))


@pytest.mark.parametrize(
    ("variances", "shift"),
    [
        pytest.param(((1, 1, 1), (1, 1, 1)), (3, 4, 0), id="shifted-mean-counts-its-square"),
        pytest.param(((1, 4, 9), (4, 4, 25)), (0, 0, 0), id="spread-counts-the-deviations-difference"),
        pytest.param(((1e-8, 1, 1e8), (1e8, 1, 1e-8)), (1, 1, 1), id="variances-far-apart"),
    ],
)
def test_gaussians_with_common_axes(variances: tuple[Sequence[float], ...], shift: Sequence[float]) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    left, right = (turn @ np.diag(np.asarray(one, dtype=float)) @ turn.T for one in variances)
    found = fid(with_moments(np.zeros(3), left, 20), with_moments(np.asarray(shift, dtype=float), right, 30, seed=5))
    expected = np.square(shift).sum() + np.square(np.sqrt(variances[0]) - np.sqrt(variances[1])).sum()
    assert found == pytest.approx(expected, rel=1e-6)


def test_gaussians_with_axes_of_their_own() -> None:
    rng = np.random.default_rng(2)
    left, right = (factor @ factor.T for factor in rng.normal(size=(2, 6, 6)))
    root = np.sqrt(np.linalg.eigvals(left @ right).real).sum()
    found = fid(with_moments(np.zeros(6), left, 50), with_moments(np.ones(6), right, 40, seed=3))
    assert found == pytest.approx(6 + np.trace(left) + np.trace(right) - 2 * root, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(left=sets(), right=sets())
def test_symmetric_never_negative_and_zero_for_the_same_set(left: np.ndarray, right: np.ndarray) -> None:
    there, back = fid(left, right), fid(right, left)
    scale = 1 + np.square(left).max() + np.square(right).max()
    assert there >= 0
    assert there == pytest.approx(back, abs=1e-9 * scale)
    assert fid(left, left[::-1]) == pytest.approx(0, abs=1e-9 * scale)
    assert fid(left + 7, right + 7) == pytest.approx(there, abs=1e-9 * (scale + 49))
    assert there >= np.square(left.mean(axis=0) - right.mean(axis=0)).sum() - 1e-9 * scale


def test_it_warns_once_of_fewer_images_than_dimensions() -> None:
    rng = np.random.default_rng(0)
    few, many = list(rng.normal(size=(3, 5))), list(rng.normal(size=(5, 5)))
    metric = FID(Pixels())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compare(many, many)
    with pytest.warns(UserWarning, match="3 images with 5 dimensions"):
        metric.compare(many, few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compare(many, few)


def test_sets_too_small_are_named() -> None:
    metric: SetMetric = FID(Pixels())
    two = list(np.eye(2))
    with pytest.raises(ValueError, match="images has 1 image, expected at least 2"):
        metric.compare(two[:1], two)
    with pytest.raises(ValueError, match="references has 0 images, expected at least 2"):
        metric.compare(two, [])


@pytest.mark.filterwarnings("ignore:FID of")
def test_clips_features_tell_other_pictures_apart(clip_folder: Path, images: list[Image.Image]) -> None:
    metric = FID(CLIPScore(clip_folder))
    dark = [image.point(lambda value: value // 4) for image in images]
    assert metric.compare(images, images) == pytest.approx(0, abs=1e-12)
    assert metric.compare(images, dark) > 1e-4
    assert (metric.name, metric.higher_is_better) == ("fid", False)
