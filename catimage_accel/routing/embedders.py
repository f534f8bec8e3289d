"""Prompts to vectors: hashed n-grams, a catalog's own text encoder, joins of several, and reading them back.

An embedder's columns fall into blocks of unlike scale (an embedding, some counts). Routers give every block the same
weight, whatever its length and unit.
"""

from __future__ import annotations

import os
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from catimage_accel.routing.counts import CountFeatures
from catimage_accel.routing.minilm import MiniLMEmbedder
from catimage_accel.routing.table import check_prompts
from catimage_accel.routing.tokens import mean_states, token_states
from catimage_accel.routing.wording import WordingFeatures


class Embedder(Protocol):
    """``embed(prompts)`` is (n, sum(blocks)) float32; ``embedder_from`` rebuilds it from the JSON of ``describe()``."""

    @property
    def blocks(self) -> tuple[int, ...]: ...

    def embed(self, prompts: Sequence[str]) -> np.ndarray: ...

    def describe(self) -> dict[str, Any]: ...


class NGramEmbedder:
    """Words, word pairs and runs of ``letters`` letters, hashed into ``size`` signed columns; rows have length 1.

    Needs no weights and reads any script. Hashing as in Weinberger et al., "Feature Hashing for Large Scale
    Multitask Learning" (arXiv 0902.2206), by CRC-32, so vectors are the same everywhere. Repeats count by their square
    root; of a prompt only the first ``MAX_CHARACTERS`` characters are read.
    """

    MAX_CHARACTERS = 2000
    MAX_WORDS = 128  # as tokens

    def __init__(self, size: int = 512, letters: tuple[int, ...] = (4,)) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1 column")
        self.size = size
        self.letters = tuple(letters)

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.size,)

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        check_prompts(prompts)
        vectors = np.zeros((len(prompts), self.size), dtype=np.float32)
        for vector, prompt in zip(vectors, prompts, strict=True):
            counts: dict[str, int] = {}
            for gram in self._grams(prompt):
                counts[gram] = counts.get(gram, 0) + 1
            for gram, count in counts.items():
                code = zlib.crc32(gram.encode(errors="surrogatepass"))
                vector[(code >> 1) % self.size] += (1 - 2 * (code & 1)) * count**0.5
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def embed_tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Each prompt's (words, size) float32: a word is embedded as a prompt of its own; of none there is one zero."""
        check_prompts(prompts)
        return [self.embed(self._words(prompt)[: self.MAX_WORDS] or [""]) for prompt in prompts]

    def describe(self) -> dict[str, Any]:
        return {"kind": "ngram", "size": self.size, "letters": list(self.letters)}

    def _words(self, prompt: str) -> list[str]:
        text = unicodedata.normalize("NFKC", prompt[: self.MAX_CHARACTERS]).casefold()
        return "".join(char if char.isalnum() else " " for char in text).split()

    def _grams(self, prompt: str) -> list[str]:
        words = self._words(prompt)
        grams = [*words, *(" ".join(pair) for pair in pairwise(words))]
        joined = f" {' '.join(words)} "
        for length in self.letters:
            # The marker keeps a run of letters apart from a word that is spelt the same.
            grams += ["#" + joined[i : i + length] for i in range(len(joined) - length + 1)]
        return grams


class TextEncoderEmbedder:
    """The mean over a prompt's tokens of the last states of a diffusers model's CLIP text encoder; rows have length 1.

    ``folder`` holds ``tokenizer`` and ``text_encoder``; they are loaded at the first use unless given. The start token,
    whose state is the same for all prompts, and the padding are left out. Longer prompts are cut at the
    tokenizer's length, as the diffusion model does.
    """

    def __init__(
        self, folder: str | Path, *, tokenizer: Any = None, text_encoder: Any = None, batch_size: int = 8
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.folder = Path(folder)
        for part, given in (("tokenizer", tokenizer), ("text_encoder", text_encoder)):
            if given is None and not (self.folder / part).is_dir():
                raise FileNotFoundError(f"no folder {self.folder / part}, expected a diffusers model with a {part}")
        self.batch_size = batch_size
        self._tokenizer, self._text_encoder = tokenizer, text_encoder

    @property
    def blocks(self) -> tuple[int, ...]:
        self._load()
        return (int(self._text_encoder.config.hidden_size),)

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        # The start token's state is the same for all prompts.
        return mean_states([states[1:] for states in self.embed_tokens(prompts)], self.blocks[0])

    def embed_tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Each prompt's (tokens, hidden_size) float32, the start and end tokens among them."""
        check_prompts(prompts)
        self._load()
        encoder = self._text_encoder

        def tokenize(texts: list[str]) -> Any:
            return self._tokenizer(
                texts, padding="longest", truncation=True, max_length=self._tokenizer.model_max_length,
                return_tensors="pt",
            ).to(encoder.device)  # fmt: skip

        def encode(tokens: Any) -> Any:
            return encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state

        return token_states(prompts, self.batch_size, tokenize, encode)

    def describe(self) -> dict[str, Any]:
        return {"kind": "text_encoder", "folder": str(self.folder)}

    def _load(self) -> None:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        if self._text_encoder is None:
            from transformers import CLIPTextModel

            folder = self.folder / "text_encoder"
            plain = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
            encoder = CLIPTextModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, variant=None if plain else "fp16"
            )
            self._text_encoder = encoder.float().eval()


class JointEmbedder:
    """Several embedders side by side, each one's blocks kept apart."""

    def __init__(self, *parts: Embedder) -> None:
        if not parts:
            raise ValueError("a JointEmbedder of no embedders, expected at least one")
        self.parts = parts

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(size for part in self.parts for size in part.blocks)

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        return np.concatenate([part.embed(prompts) for part in self.parts], axis=1)

    def describe(self) -> dict[str, Any]:
        return {"kind": "joint", "parts": [part.describe() for part in self.parts]}


def with_counts(embedder: Embedder) -> JointEmbedder:
    """``embedder``, with counts and wording beside it."""
    return JointEmbedder(embedder, CountFeatures(), WordingFeatures())


def embedder_from(description: Mapping[str, Any], folder: Path) -> Embedder:
    """Rebuild an embedder from its ``describe()``; a relative path in it starts at ``folder``."""
    kind = description.get("kind")
    if kind == "ngram":
        return NGramEmbedder(int(description["size"]), tuple(description["letters"]))
    if kind == "counts":
        return CountFeatures()
    if kind == "wording":
        return WordingFeatures()
    if kind == "minilm":
        return MiniLMEmbedder()
    if kind == "text_encoder":
        return TextEncoderEmbedder(Path(os.path.normpath(folder / description["folder"])))
    if kind == "joint":
        return JointEmbedder(*(embedder_from(part, folder) for part in description["parts"]))
    raise ValueError(f"unknown embedder {kind!r}, expected ngram, counts, wording, minilm, text_encoder or joint")


def relocatable(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``description`` with its paths made relative to ``folder``, so that a catalog may be moved as a whole."""
    found = dict(description)
    if "parts" in found:
        found["parts"] = [relocatable(part, folder) for part in found["parts"]]
    if "folder" in found:
        found["folder"] = Path(os.path.relpath(found["folder"], folder)).as_posix()
    return found
