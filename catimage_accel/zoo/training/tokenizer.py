"""The zoo's CLIP tokenizer: byte-level BPE in which every word of the captions is one token."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.training.data import spec

MAX_TOKENS = 24
WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: int = 20_000) -> CLIPTokenizer:
    """Learn merges from training captions; any other text still falls apart into bytes, as in CLIP."""
    rng = np.random.default_rng(0)
    texts = [caption(spec(index, "train"), rng) for index in range(captions)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, BEGIN, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(learner: Tokenizer) -> list[list[str]]:
    import json

    merges = json.loads(learner.to_str())["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]
