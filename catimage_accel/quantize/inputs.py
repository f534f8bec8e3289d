"""What a UNet is given: the inputs that it is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNetInputs"]


@dataclass(frozen=True, eq=False)
class UNetInputs:
    """Rows of a UNet's inputs; values that are not finite, or counts of rows that differ, raise ValueError.

    Attributes:
        sample: (rows, C, height, width) Noisy latents, scaled as the UNet takes them.
        timestep: (rows,)
        encoder_hidden_states: (rows, tokens, features)
        text_embeds: (rows, features) The whole prompt, which SDXL's UNets take besides; None for others.
        time_ids: (rows, 6) Sizes in pixels, with ``text_embeds``.
    """

    sample: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.text_embeds is None) != (self.time_ids is None):
            missing = "text_embeds" if self.text_embeds is None else "time_ids"
            raise ValueError(f"{missing} is None; accepted: text_embeds with time_ids, or neither")
        for name, value in self._tensors().items():
            if len(value) != len(self.sample):
                raise ValueError(f"{name} has {len(value)} rows and sample {len(self.sample)}; accepted: as many")
            broken = ~torch.isfinite(value).flatten(1).all(1) if value.ndim > 1 else ~torch.isfinite(value)
            if bool(broken.any()):
                raise ValueError(
                    f"{name} has NaN or infinity in {int(broken.sum())} of {len(value)} rows; accepted: finite inputs, "
                    "such as a candidate's in float32"
                )

    def __len__(self) -> int:
        return len(self.sample)

    def rows(self, index: Sequence[int] | slice) -> UNetInputs:
        """These rows only."""
        index = index if isinstance(index, slice) else list(index)
        return UNetInputs(**{name: value[index] for name, value in self._tensors().items()})

    def batches(self, size: int = 8) -> list[UNetInputs]:
        """The rows in their order, ``size`` at a time."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    @classmethod
    def joined(cls, parts: Sequence[UNetInputs]) -> UNetInputs:
        """The rows of all ``parts``, one after the other."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._tensors()})

    @torch.no_grad()
    def through(self, unet: Any) -> Tensor:
        """The UNet's output for these rows, float32 (rows, C, height, width)."""
        at = {"device": unet.device, "dtype": unet.dtype}
        added = None
        if self.text_embeds is not None and self.time_ids is not None:
            added = {"text_embeds": self.text_embeds.to(**at), "time_ids": self.time_ids.to(unet.device)}
        output = unet(
            self.sample.to(**at), self.timestep.to(unet.device), self.encoder_hidden_states.to(**at),
            added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        return output[0].float()

    def _tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: value for one in fields(self) if (value := getattr(self, name := one.name)) is not None}
