"""The kernel router: what its ridges do, and that landmarks stand in for many prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_routers import TABLE, planted_table

from catimage_accel.routing import CountFeatures, KernelRouter, KNNRouter, ScoreTable, evaluate, load_router
from catimage_accel.routing import kernel as kernel_module

UNSEEN = [f"a {noun}, a lemon and a walrus" for noun in ("dog", "cat", "crown")]


def test_by_hand_it_is_ridge_regression_in_the_kernel() -> None:
    """With what was chosen put into the textbook formula."""
    router = KernelRouter(CountFeatures()).fit(TABLE)
    vectors = router._features(sorted(TABLE.prompts))
    squares = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    alike = np.exp(-squares / (2 * router.width**2))
    scores = TABLE.scores[np.argsort(TABLE.prompts)] - TABLE.mean_scores
    _, _, directions = np.linalg.svd(scores, full_matrices=False)
    expected = np.tile(TABLE.mean_scores, (len(TABLE), 1))
    for direction, ridge in zip(directions, router.ridges, strict=True):
        if np.isfinite(ridge):
            weights = np.linalg.solve(alike + ridge * np.eye(len(TABLE)), scores @ direction)
            expected += np.outer(alike @ weights, direction)
    np.testing.assert_allclose(router.predict(sorted(TABLE.prompts)), expected, atol=1e-5)


def test_a_part_that_does_not_show_in_the_text_is_left_at_the_mean() -> None:
    rng = np.random.default_rng(0)
    noise = ScoreTable(TABLE.prompts, TABLE.candidates, rng.normal(size=TABLE.scores.shape), TABLE.costs)
    predicted = KernelRouter().fit(noise).predict(UNSEEN)
    assert np.abs(predicted - noise.mean_scores).max() < 0.25  # of scores whose deviation is 1


def test_prompts_unlike_any_seen_are_predicted_the_mean() -> None:
    far = KernelRouter(CountFeatures()).fit(TABLE).predict(["every 9999 " * 800])
    np.testing.assert_allclose(far, [TABLE.mean_scores], atol=1e-6)


def test_it_routes_better_than_the_mix_and_no_worse_than_neighbours() -> None:
    share = evaluate(KernelRouter, TABLE).gain_share.value
    neighbours = evaluate(KNNRouter, TABLE).gain_share.value
    assert share is not None
    assert neighbours is not None
    assert share > 0.3
    assert share > neighbours - 0.05


def test_row_order_plays_no_part_and_company_only_rounding() -> None:
    router = KernelRouter().fit(TABLE)
    shuffled = KernelRouter().fit(TABLE.select(np.random.default_rng(0).permutation(len(TABLE))))
    np.testing.assert_allclose(shuffled.predict(UNSEEN), router.predict(UNSEEN), atol=1e-9)
    alone = np.concatenate([router.predict([prompt]) for prompt in UNSEEN])
    np.testing.assert_allclose(alone, router.predict(UNSEEN), atol=1e-12)


def test_landmarks_do_nearly_what_all_prompts_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = planted_table(300, seed=1)
    exact = KernelRouter(CountFeatures()).fit(table).predict(UNSEEN)
    monkeypatch.setattr(kernel_module, "MAX_LANDMARKS", 80)
    router = KernelRouter(CountFeatures()).fit(table)
    np.testing.assert_allclose(router.predict(UNSEEN), exact, atol=0.02)
    router.save(tmp_path)
    assert (tmp_path / "router.safetensors").stat().st_size < 20_000
    np.testing.assert_array_equal(load_router(tmp_path).predict(UNSEEN), router.predict(UNSEEN))


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_few_prompts_are_predicted_too(prompts: int) -> None:
    predicted = KernelRouter().fit(TABLE.select(range(prompts))).predict(UNSEEN)
    assert predicted.shape == (3, 3)
    assert np.isfinite(predicted).all()


def test_one_candidate() -> None:
    assert KernelRouter().fit(TABLE.restrict(["4 steps"])).predict(UNSEEN).shape == (3, 1)
