"""The Transformer router: it learns, it is the same for the same seed, and it survives saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_routers import TABLE, planted_table

from catimage_accel.routing import NGramEmbedder, ScoreTable, TextEncoderEmbedder, TransformerRouter, load_router

UNSEEN = ["a dog and a walrus", "a dog and a cat and a crown and a car on red", "", "\u732b", "word " * 500]


@pytest.fixture(scope="module")
def fitted() -> TransformerRouter:
    return TransformerRouter(NGramEmbedder(64), seed=1).fit(TABLE)


def test_it_learns_what_shows_in_the_text(fitted: TransformerRouter) -> None:
    other = planted_table(120, seed=5)
    unseen = other.select([i for i, prompt in enumerate(other.prompts) if prompt not in TABLE.prompts])
    error = ((fitted.predict(unseen.prompts) - unseen.scores) ** 2).mean()
    assert error < 0.5 * ((TABLE.mean_scores - unseen.scores) ** 2).mean()


def test_the_seed_decides(fitted: TransformerRouter) -> None:
    few = TABLE.select(range(40))
    first, again, other = (TransformerRouter(NGramEmbedder(64), seed=seed).fit(few) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.predict(UNSEEN), again.predict(UNSEEN))
    assert (first.predict(UNSEEN) != other.predict(UNSEEN)).any()


def test_saved_it_predicts_the_same(fitted: TransformerRouter, tmp_path: Path) -> None:
    predicted = fitted.predict(UNSEEN)
    assert np.isfinite(predicted).all()
    fitted.save(tmp_path)
    loaded = load_router(tmp_path, candidates=TABLE.candidates)
    np.testing.assert_array_equal(loaded.predict(UNSEEN), predicted)
    assert loaded.predict([]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"token vectors have 64 columns, but those of .* have 32; fit it again"):
        load_router(tmp_path, NGramEmbedder(32))


def test_company_changes_only_rounding(fitted: TransformerRouter) -> None:
    alone = np.concatenate([fitted.predict([prompt]) for prompt in UNSEEN])
    np.testing.assert_allclose(alone, fitted.predict(UNSEEN), atol=1e-5)


def test_noise_is_predicted_as_the_mean() -> None:
    rng = np.random.default_rng(0)
    noise = ScoreTable(TABLE.prompts, TABLE.candidates, rng.normal(size=TABLE.scores.shape), TABLE.costs)
    router = TransformerRouter(NGramEmbedder(64)).fit(noise)
    assert np.abs(router.predict(UNSEEN) - noise.mean_scores).max() < 0.5  # of scores whose deviation is 1


def test_a_text_encoder_gives_its_token_states(tiny_sd_folder: Path, tmp_path: Path) -> None:
    embedder = TextEncoderEmbedder(tiny_sd_folder)
    tokens: Sequence[np.ndarray] = embedder.embed_tokens(["a dog", "three lemons and a crown"])
    assert [one.shape[1] for one in tokens] == [32, 32]
    assert len(tokens[0]) < len(tokens[1])
    router = TransformerRouter(embedder).fit(TABLE.select(range(24)))
    router.save(tmp_path)
    np.testing.assert_allclose(load_router(tmp_path).predict(UNSEEN), router.predict(UNSEEN), atol=1e-6)


def test_too_few_prompts() -> None:
    with pytest.raises(ValueError, match="a table of 7 prompts, expected 8 or more"):
        TransformerRouter().fit(TABLE.select(range(7)))
