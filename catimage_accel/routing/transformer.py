"""A small Transformer over a prompt's tokens that predicts one quality a candidate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from catimage_accel.routing.embedders import NGramEmbedder, embedder_from, relocatable
from catimage_accel.routing.routers import FittedRouter
from catimage_accel.routing.storage import SavedRouter
from catimage_accel.routing.table import ScoreTable, check_prompts
from catimage_accel.routing.tokens import TokenEmbedder

WIDTH, HEADS, LAYERS, DROPOUT = 64, 4, 2, 0.2
BATCH_SIZE, EPOCHS, PATIENCE = 32, 60, 8
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
HELD_OUT_SHARE = 0.15
LONGEST = 256  # tokens that are read


class TokenTransformer(nn.Module):
    """(batch, tokens, columns) token vectors and a (batch, tokens) mask of the real ones to (batch, outputs)."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Linear(columns, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LONGEST, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, DROPOUT, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm, self.drop, self.head = nn.LayerNorm(WIDTH), nn.Dropout(DROPOUT), nn.Linear(WIDTH, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """See the class."""
        hidden = self.project(tokens) + self.position[: tokens.shape[1]]
        hidden = self.norm(self.layers(hidden, src_key_padding_mask=~real))
        mean = (hidden * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        found: Tensor = self.head(self.drop(mean))
        return found


class TransformerRouter(FittedRouter):
    """Predicts qualities by a two-layer Transformer over token vectors, as CATImage (arXiv 2506.14753) proposes.

    ``embedder`` gives the vectors: a text model's token states, or hashed words (the default, which needs no weights).
    The targets are the scores less each candidate's mean, in units of their deviation. Training stops when the error on
    a held-out share of the prompts has not fallen for some epochs and keeps the best weights; a prediction is then
    drawn towards the mean as far as lessens that error, at most to it. The same ``seed``, table and number of threads
    give the same router on a CPU. ``fit`` raises ValueError for fewer than 8 prompts.
    """

    KIND = "transformer"

    def __init__(self, embedder: TokenEmbedder | None = None, *, seed: int = 0) -> None:
        self.embedder: TokenEmbedder = embedder or NGramEmbedder(256)
        self.seed = seed

    def fit(self, table: ScoreTable) -> Self:
        if len(table) < 8:
            raise ValueError(f"a table of {len(table)} prompts, expected 8 or more to train on and to stop by")
        train, held_out = table.split(HELD_OUT_SHARE, self.seed)
        self._candidates, self._mean = table.candidates, train.mean_scores
        self._deviation = max(float((train.scores - self._mean).std()), 1e-9)
        parts = [
            (self._tokens(part.prompts), torch.from_numpy((part.scores - self._mean) / self._deviation).float())
            for part in (train, held_out)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            columns = parts[0][0][0].shape[1]
            self._model = _train(TokenTransformer(columns, len(table.candidates)), *parts)
        predicted, targets = _run(self._model, parts[1][0]), parts[1][1]
        self._trust = float(((predicted * targets).sum() / predicted.square().sum().clamp(min=1e-12)).clamp(0, 1))
        return self

    def predict(self, prompts: Sequence[str]) -> np.ndarray:
        self.require_fitted()
        check_prompts(prompts)
        quality = np.tile(self._mean, (len(prompts), 1))
        if len(prompts):
            found = _run(self._model, self._tokens(prompts)).double().numpy()
            quality += self._trust * self._deviation * found
        return quality

    def save(self, folder: str | Path) -> None:
        names, folder = self.require_fitted(), Path(folder)
        settings: dict[str, Any] = {
            "seed": self.seed,
            "deviation": self._deviation,
            "trust": self._trust,
            "embedder": relocatable(self.embedder.describe(), folder),
        }
        weights = {f"model.{name}": tensor.numpy() for name, tensor in self._model.state_dict().items()}
        SavedRouter(self.KIND, names, settings, {"mean": self._mean, **weights}, folder).write()

    @classmethod
    def restore(cls, saved: SavedRouter, embedder: Any = None) -> Self:
        """Read a saved router; ValueError when ``embedder`` gives token vectors of another width."""
        embedder = embedder or embedder_from(saved.settings["embedder"], saved.folder)
        router = cls(embedder, seed=int(saved.settings["seed"]))
        router._candidates = saved.candidates
        router._mean = saved.tensor("mean", (len(saved.candidates),))
        router._deviation, router._trust = float(saved.settings["deviation"]), float(saved.settings["trust"])
        columns = saved.tensor("model.project.weight", (WIDTH, None)).shape[1]
        found = embedder.embed_tokens(["a dog"])[0].shape[1]
        if found != columns:
            raise ValueError(
                f"the router in {saved.folder} was fitted with the embedder {saved.settings['embedder']}, whose token "
                f"vectors have {columns} columns, but those of {embedder.describe()} have {found}; fit it again"
            )
        model = TokenTransformer(columns, len(saved.candidates))
        weights = {name: saved.tensor(f"model.{name}", tuple(t.shape)) for name, t in model.state_dict().items()}
        model.load_state_dict({name: torch.from_numpy(array).float() for name, array in weights.items()})
        router._model = model.eval()
        return router

    def _tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        return [torch.from_numpy(tokens[:LONGEST]) for tokens in self.embedder.embed_tokens(prompts)]


Part = tuple[list[Tensor], Tensor]


def _train(model: TokenTransformer, train: Part, held_out: Part) -> TokenTransformer:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    tokens, targets = train
    best, least, waited = copy.deepcopy(model), float(held_out[1].square().mean()), 0
    for _ in range(EPOCHS):
        model.train()
        for rows in torch.randperm(len(tokens)).split(BATCH_SIZE):
            predicted = model(*_padded([tokens[row] for row in rows.tolist()]))
            optimizer.zero_grad()
            nn.functional.mse_loss(predicted, targets[rows]).backward()
            optimizer.step()
        error = float((_run(model, held_out[0]) - held_out[1]).square().mean())
        waited += 1
        if error < least:
            best, least, waited = copy.deepcopy(model), error, 0
        if waited >= PATIENCE:
            break
    return best.eval()


@torch.no_grad()
def _run(model: TokenTransformer, tokens: list[Tensor]) -> Tensor:
    """(n, outputs), prompts of like length together."""
    model.eval()
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found = torch.zeros(len(tokens), model.head.out_features)
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        found[rows] = model(*_padded([tokens[row] for row in rows]))
    return found


def _padded(tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(one) for one in tokens])
    batch = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]
