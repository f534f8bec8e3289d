"""Vectors of a prompt's tokens, by a text model or by hashing its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class TokenEmbedder(Protocol):
    """``embed_tokens(prompts)`` is one (tokens, width) float32 array a prompt, with a token at least."""

    def embed_tokens(self, prompts: Sequence[str]) -> list[np.ndarray]: ...

    def describe(self) -> dict[str, Any]: ...


def token_states(
    prompts: Sequence[str],
    batch_size: int,
    tokenize: Callable[[list[str]], Any],
    encode: Callable[[Any], torch.Tensor],
) -> list[np.ndarray]:
    """A text model's states of the real tokens of each prompt; prompts of like length go through it together."""
    import torch

    states: list[np.ndarray] = [np.zeros((0, 0), np.float32)] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        tokens = tokenize([prompts[i] for i in rows])
        with torch.no_grad():
            found = encode(tokens).float().cpu().numpy()
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        for i, one, length in zip(rows, found, lengths, strict=True):
            states[i] = one[:length]
    return states


def mean_states(states: Sequence[np.ndarray], width: int) -> np.ndarray:
    """(n, width) float32: each prompt's mean over its tokens, of length 1; zeros where it has none."""
    means = np.zeros((len(states), width), dtype=np.float32)
    for mean, one in zip(means, states, strict=True):
        if len(one):
            mean[:] = one.mean(axis=0)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
