"""The tokenizer is the same every time, knows the captions' words whole and survives any other text."""

from __future__ import annotations

import numpy as np
import pytest

from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.training.data import spec
from catimage_accel.zoo.training.tokenizer import MAX_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(captions=3000)


def test_two_builds_agree(tokenizer):
    assert build_tokenizer(captions=3000).get_vocab() == tokenizer.get_vocab()


def test_every_word_of_a_caption_is_one_token(tokenizer):
    rng = np.random.default_rng(1)
    for index in range(200):
        text = caption(spec(index, "train"), rng)
        words = text.replace(",", " ,").split()
        assert len(tokenizer(text).input_ids) == len(words) + 2, text


def test_every_caption_fits(tokenizer):
    rng = np.random.default_rng(2)
    lengths = [len(tokenizer(caption(spec(index, "test"), rng)).input_ids) for index in range(500)]
    assert max(lengths) <= MAX_TOKENS


@pytest.mark.parametrize("text", ["zebra", "ein Löwe", "猫", "🐶!", "a\tdog\n"], ids=ascii)
def test_foreign_text_keeps_its_letters(tokenizer, text):
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == "".join(text.split()).lower()
