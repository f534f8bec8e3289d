"""What a UNet is given: the inputs that it is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    sample: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor

    def __post_init__(self) -> None:
        for name in ("sample", "timestep", "encoder_hidden_states"):
            value = getattr(self, name)
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
        return UNetInputs(self.sample[index], self.timestep[index], self.encoder_hidden_states[index])

    def batches(self, size: int = 8) -> list[UNetInputs]:
        """The rows in their order, ``size`` at a time."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    @classmethod
    def joined(cls, parts: Sequence[UNetInputs]) -> UNetInputs:
        """The rows of all ``parts``, one after the other."""
        return cls(
            torch.cat([part.sample for part in parts]),
            torch.cat([part.timestep for part in parts]),
            torch.cat([part.encoder_hidden_states for part in parts]),
        )

    @torch.no_grad()
    def through(self, unet: Any) -> Tensor:
        """The UNet's output for these rows, float32 (rows, C, height, width)."""
        at = {"device": unet.device, "dtype": unet.dtype}
        output = unet(
            self.sample.to(**at), self.timestep.to(unet.device), self.encoder_hidden_states.to(**at), return_dict=False
        )
        return output[0].float()
