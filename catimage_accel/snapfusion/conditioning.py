"""The text side of a training run: a frozen text encoder, captions dropped now and then."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from catimage_accel.engines.loading import load_component
from catimage_accel.training.config import TRAINING_ATTENTION


class FrozenText:
    """The tokenizer and text encoder of a diffusers folder, in ``dtype`` on ``device``; never trained."""

    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(str(model), subfolder="tokenizer", local_files_only=True)
        self.encoder = load_component(CLIPTextModel, model, "text_encoder", torch.float32).to(device, dtype)
        self.encoder.set_attn_implementation(TRAINING_ATTENTION)
        self.device = device
        self._empty = self.encode([""])

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """The encoder's last state, (captions, tokens, features)."""
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.encoder(ids.to(self.device))[0]

    def empty(self, rows: int) -> Tensor:
        """The state of the empty caption, for each of ``rows`` rows: what guidance leads away from."""
        return self._empty.expand(rows, -1, -1)


def with_dropout(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """The captions, each made empty with probability ``share``."""
    drop = torch.rand(len(captions), generator=generator) < share
    return ["" if dropped else text for text, dropped in zip(captions, drop.tolist(), strict=True)]
