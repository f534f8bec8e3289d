"""An embedder that remembers, for routers that are fitted on the same prompts again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from catimage_accel.routing.embedders import Embedder


class RememberingEmbedder:
    """The vectors of ``embedder``, computed once a prompt and kept as long as this object is."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._known: dict[str, np.ndarray] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.embedder.blocks

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new or not prompts:
            vectors = self.embedder.embed(new)
            self._known.update(zip(new, vectors, strict=True))
        return np.stack([self._known[prompt] for prompt in prompts]) if prompts else vectors

    def describe(self) -> dict[str, Any]:
        return self.embedder.describe()
