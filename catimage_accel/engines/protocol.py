"""What an engine is: the device half of a candidate, with no knowledge of samplers or requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from catimage_accel.candidate import OWN_VAE

__all__ = ["ADDED_CONDITIONS", "DeepFeatures", "EncodedPrompt", "Engine", "TextBatch", "TextState"]

KeyValue = tuple[Tensor, Tensor]
ADDED_CONDITIONS = ("text_embeds", "time_ids")
"""Names of what SDXL's UNets take beside the text."""


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """What a folder's text encoders make of a prompt.

    ``hidden`` (tokens, features) is for cross-attention; ``pooled`` (features,) the whole prompt, which SDXL's UNets
    take as ``text_embeds``, None for others.
    """

    hidden: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TextState:
    """What one prompt gives a UNet: everything about it that does not change over the steps.

    ``layers`` holds the keys and values that each cross-attention layer computes from it, (tokens, heads, head_dim)
    each, in the order of the UNet's modules.
    """

    prompt: str
    encoded: EncodedPrompt
    layers: tuple[KeyValue, ...] = ()

    @property
    def hidden(self) -> Tensor:
        return self.encoded.hidden


@dataclass(eq=False)
class TextBatch:
    """TextStates gathered for the rows of a batch, all with a rows axis: ``hidden`` (rows, tokens, features)."""

    hidden: Tensor
    layers: list[KeyValue]
    pooled: Tensor | None = None
    _subsets: dict[tuple[int, ...], TextBatch] = field(default_factory=dict)

    @classmethod
    def gather(cls, states: Sequence[TextState]) -> TextBatch:
        layers = zip(*(state.layers for state in states), strict=True)
        return cls(
            torch.stack([state.hidden for state in states]),
            [(torch.stack([key for key, _ in rows]), torch.stack([value for _, value in rows])) for rows in layers],
            None if states[0].encoded.pooled is None else torch.stack([_pooled(state) for state in states]),
        )

    def rows(self, index: tuple[int, ...]) -> TextBatch:
        """The batch of these rows only; computed once an index."""
        if index not in self._subsets:
            rows = torch.tensor(index, device=self.hidden.device)
            self._subsets[index] = TextBatch(
                self.hidden[rows], [(key[rows], value[rows]) for key, value in self.layers],
                None if self.pooled is None else self.pooled[rows],
            )  # fmt: skip
        return self._subsets[index]

    def added_conditions(self, height: int, width: int) -> dict[str, Tensor] | None:
        """What SDXL's UNets take besides, for whole pictures of ``height`` x ``width`` pixels; None for other UNets.

        ``text_embeds`` (rows, features) and ``time_ids`` (rows, 6) float32: the sizes of the original and of the
        target, uncropped, as diffusers has them unless told otherwise (arXiv 2307.01952, section 2.2).
        """
        if self.pooled is None:
            return None
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.pooled.device)
        return dict(zip(ADDED_CONDITIONS, (self.pooled, size.expand(len(self.pooled), -1)), strict=True))


def _pooled(state: TextState) -> Tensor:
    assert state.encoded.pooled is not None
    return state.encoded.pooled


@dataclass(eq=False)
class DeepFeatures:
    """The part of the UNet's work that DeepCache carries from step to step (arXiv 2312.00858).

    ``features`` (rows, channels, height, width) is the input of the last up block, None before the first step;
    ``refresh`` names the rows whose features this step recomputes (None: all). The engine updates ``features``.
    """

    features: Tensor | None = None
    refresh: tuple[int, ...] | None = None


@runtime_checkable
class Engine(Protocol):
    """One set of UNet weights on one device, with the text encoder and the decoders that go with it.

    An engine keeps no state between calls that shows in a result, and serves one thread at a time.
    """

    name: str
    """What a candidate's ``engine`` calls it."""
    device: torch.device
    dtype: torch.dtype
    channels: int
    """Channels of the latents."""
    sample_size: tuple[int, int]
    """Height and width of the latents that the UNet was trained on."""
    scale_factor: int
    """Pixels a latent, along each side."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's denoised or decoded result has the same bits whatever other rows are in the batch."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextState]:
        """One state a prompt, in order; a prompt whose state is still in use anywhere is not computed again."""
        ...

    def unconditional(self) -> TextState:
        """What guidance leads away from: the empty prompt's state, or what the model has in its place."""
        ...

    def gather(self, states: Sequence[TextState]) -> TextBatch:
        """The states as one batch, to be kept for as long as the rows stay the same."""
        ...

    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextBatch,
        added: Mapping[str, Any] | None = None,
        *,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """The UNet's output, float32 (rows, C, h, w), for ``sample`` (rows, C, h, w) and ``timestep`` (rows,).

        ``added`` is ``text.added_conditions`` at the picture's size.
        """
        ...

    def decode(self, latents: Tensor, vae: str = OWN_VAE) -> Tensor:
        """Images (n, 3, height, width), float32 around [-1, 1], of latents (n, C, h, w).

        ``vae`` is the subfolder of the model with the VAE to decode them with.
        """
        ...
