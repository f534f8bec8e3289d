"""Embedders: what they see in prompts of any kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from catimage_accel.routing import CountFeatures, Embedder, JointEmbedder, NGramEmbedder, TextEncoderEmbedder

PROMPTS = [
    "a dog on a red background",
    "A DOG on a red background",
    "three lemons",
    "",
    "\u72ac\u3068\u732b",
    "x" * 10_000,
]


@pytest.mark.parametrize(
    "embedder", [NGramEmbedder(), CountFeatures(), JointEmbedder(CountFeatures(), NGramEmbedder(64))]
)
def test_any_text_embeds_alone_as_among_others(embedder: Embedder) -> None:
    together = embedder.embed(PROMPTS)
    assert together.shape == (len(PROMPTS), sum(embedder.blocks))
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together, np.concatenate([embedder.embed([prompt]) for prompt in PROMPTS]))
    np.testing.assert_array_equal(together[0], together[1])
    assert embedder.embed([]).shape == (0, sum(embedder.blocks))


def test_ngrams_place_a_shared_word_nearer() -> None:
    dog, dogs, lemon = NGramEmbedder().embed(["a small dog", "two small dogs", "yellow lemon juice"])
    assert dog @ dogs > dog @ lemon + 0.2


def test_counts_are_those_a_reader_makes() -> None:
    prompt = "A picture of three lemons, a red dog and no cat to the left of 2 houses"
    counted = dict(zip(CountFeatures.NAMES, np.expm1(CountFeatures().embed([prompt])[0]).round(), strict=True))
    assert counted["words"] == 17
    assert counted["characters"] == len(prompt)
    assert counted["things"] == 3 + 3 + 2
    assert counted["numbers"] == 2
    assert counted["joints"] == 2
    assert counted["negations"] == counted["colours"] == counted["spatial"] == 1


def test_text_encoder_means_real_tokens_only(tiny_sd_folder: Path) -> None:
    embedder = TextEncoderEmbedder(tiny_sd_folder, batch_size=2)
    together = embedder.embed(PROMPTS)
    assert together.shape == (len(PROMPTS), 32) == (len(PROMPTS), embedder.blocks[0])
    np.testing.assert_allclose(together, np.concatenate([embedder.embed([prompt]) for prompt in PROMPTS]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert abs(together[0] - together[2]).max() > 0.01


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts is the string 'a dog', expected a list"):
        NGramEmbedder().embed("a dog")
    with pytest.raises(ValueError, match="prompt 1 is None"):
        CountFeatures().embed(["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="size is 0"):
        NGramEmbedder(0)
    with pytest.raises(ValueError, match="at least one"):
        JointEmbedder()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        TextEncoderEmbedder(tmp_path)
