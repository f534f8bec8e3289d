"""Prompts to what a UNet reads of them: Stable Diffusion's one text encoder, or SDXL's two."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from catimage_accel.engines.loading import has_two_text_encoders, load_component, read_config
from catimage_accel.engines.protocol import EncodedPrompt

__all__ = ["PROMPT_CUT_OFF", "TextEncoders", "text_widths"]

PROMPT_CUT_OFF = "a prompt is cut off"
"""How the warning of a prompt that is longer than what the text encoder reads begins."""
SHOWN = 60


class TextEncoders:
    """The tokenizers and text encoders of one model folder, in ``dtype`` on ``device``.

    With one, a prompt is its last state. With two, as SDXL has them, it is the states before both last layers, side by
    side, and the second one's projection of the whole prompt.
    """

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        def tokenizer(part: str) -> Any:
            return CLIPTokenizer.from_pretrained(str(model), subfolder=part, local_files_only=True)

        self.dtype, self.device = dtype, device
        self._two = has_two_text_encoders(model)
        self._tokenizers = [tokenizer("tokenizer")]
        self.encoders = [load_component(CLIPTextModel, model, "text_encoder", dtype).to(device)]
        self._empty_is_zero = False
        if self._two:
            self._tokenizers.append(tokenizer("tokenizer_2"))
            second = load_component(CLIPTextModelWithProjection, model, "text_encoder_2", dtype)
            self.encoders.append(second.to(device))
            index = model / "model_index.json"
            self._empty_is_zero = not index.is_file() or read_config(index).get("force_zeros_for_empty_prompt", True)
        self.tokens: int = self._tokenizers[0].model_max_length
        self.features, self.pooled_features = text_widths(model)
        self._encoded: WeakValueDictionary[str, EncodedPrompt] = WeakValueDictionary()
        self._unconditional: EncodedPrompt | None = None

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """Each prompt, in order; not computed again while in use."""
        known = {prompt: found for prompt in prompts if (found := self._encoded.get(prompt)) is not None}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            known |= dict(zip(missing, self._compute(missing), strict=True))
            self._encoded.update(known)
        return [known[prompt] for prompt in prompts]

    @torch.inference_mode()
    def unconditional(self) -> EncodedPrompt:
        """What guidance leads away from: the empty prompt, or zeros, as SDXL's own folder asks for. Computed once."""
        if self._unconditional is None:
            if self._empty_is_zero:
                at = {"dtype": self.dtype, "device": self.device}
                hidden = torch.zeros(self.tokens, self.features, **at)
                self._unconditional = EncodedPrompt(hidden, torch.zeros(self.pooled_features or 0, **at))
            else:
                self._unconditional = self.encode([""])[0]
        return self._unconditional

    def _compute(self, prompts: list[str]) -> list[EncodedPrompt]:
        if not self._two:
            hidden = self.encoders[0](self._token_ids(prompts, 0), attention_mask=None)[0].to(self.dtype)
            return [EncodedPrompt(row.clone()) for row in hidden]
        outputs = [
            encoder(self._token_ids(prompts, place), output_hidden_states=True)
            for place, encoder in enumerate(self.encoders)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).to(self.dtype)
        pooled = outputs[1].text_embeds.to(self.dtype)
        return [EncodedPrompt(row.clone(), whole.clone()) for row, whole in zip(states, pooled, strict=True)]

    def _token_ids(self, prompts: list[str], place: int) -> Tensor:
        tokenizer = self._tokenizers[place]
        limit = tokenizer.model_max_length
        ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        if place > 0:  # the words are the first one's: nothing to warn of twice
            return ids.to(self.device)
        whole = tokenizer(prompts, padding=False, truncation=False, verbose=False).input_ids
        for prompt, tokens in zip(prompts, whole, strict=True):
            if len(tokens) > limit:
                left_out = tokenizer.decode(tokens[limit - 1 : -1])
                # Without a registry, in which every text would stay for good.
                warnings.warn_explicit(
                    f"{PROMPT_CUT_OFF}: {_begin(prompt)} has {len(tokens)} tokens; only {limit} are read, and "
                    f"{_begin(left_out)} is not",
                    UserWarning, __file__, self._token_ids.__code__.co_firstlineno,
                )  # fmt: skip
        return ids.to(self.device)


def text_widths(model: Path) -> tuple[int, int | None]:
    """(features a token, features of the whole prompt) that a folder's text encoders give; None with one encoder."""
    width = read_config(model / "text_encoder" / "config.json")["hidden_size"]
    if not has_two_text_encoders(model):
        return width, None
    second = read_config(model / "text_encoder_2" / "config.json")
    return width + second["hidden_size"], second["projection_dim"]


def _begin(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
