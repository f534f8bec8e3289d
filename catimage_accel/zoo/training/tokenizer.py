"""The zoo's CLIP tokenizer: byte-level BPE in which every word of the captions is one token."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.training.data import spec

MAX_TOKENS = 24
WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: int = 20_000) -> CLIPTokenizer:
    """Learn merges from training captions; any other text still falls apart into bytes, as in CLIP."""
    rng = np.random.default_rng(0)
    words: Counter[str] = Counter()
    for index in range(captions):
        words.update(re.findall(r"[a-z]+|[^\sa-z]+", caption(spec(index, "train"), rng)))
    merges = learn_merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, BEGIN, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is whole, most frequent first, ties in alphabetical order.

    The tokenizers library's trainer breaks ties by the order of a hash map, so that no two runs agree.
    """
    split = {word: [*word[:-1], word[-1] + WORD_END] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            split[word] = _merged(parts, best)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
