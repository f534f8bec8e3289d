"""What a student draws while it is trained: pictures to look at, and their CLIPScore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from catimage_accel.executor.flight import to_bytes
from catimage_accel.quality import CLIPScore
from catimage_accel.snapfusion.conditioning import FrozenText
from catimage_accel.snapfusion.losses import Denoiser, guided_prediction
from catimage_accel.snapfusion.schedule import VelocitySchedule, ddim_step

BATCH = 16
COLUMNS = 8


class Preview:
    """Draws the same prompts from the same noise, whenever asked, and scores what came out.

    ``judge`` is a CLIP folder, None for no scores. ``shape`` is that of one image's latents.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        text: FrozenText,
        schedule: VelocitySchedule,
        vae: AutoencoderKL,
        shape: tuple[int, int, int],
        judge: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.prompts, self.schedule, self.vae = list(prompts), schedule, vae
        noise = torch.randn((len(self.prompts), *shape), generator=torch.Generator().manual_seed(seed))
        self._noise = noise.to(schedule.alpha.device)
        self._hidden, self._text = text.encode(self.prompts), text
        self._judge = None if judge is None else CLIPScore(judge, device=self._noise.device)

    @torch.no_grad()
    def latents(self, denoiser: Denoiser, steps: int, guidance_scale: float) -> Tensor:
        """DDIM's latents of all prompts, float32."""
        way = list(zip(self.schedule.grid(steps)[:-1], self.schedule.after(steps), strict=True))
        parts = []
        for sample, hidden in zip(self._noise.split(BATCH), self._hidden.split(BATCH), strict=True):
            for now, after in way:
                timestep = now.expand(len(sample))
                said = guided_prediction(
                    denoiser, sample, timestep, hidden, self._text.empty(len(sample)), guidance_scale
                )
                velocity = self.schedule.velocity(sample, said, timestep)
                sample = ddim_step(sample, velocity, self.schedule.rates(now), self.schedule.rates(after))
            parts.append(sample)
        return torch.cat(parts)

    def pictures(self, latents: Tensor) -> list[np.ndarray]:
        """uint8 (height, width, 3), one a prompt."""
        return decoded_pictures(self.vae, latents)

    def score(self, denoiser: Denoiser, steps: int, guidance_scale: float) -> float:
        """The mean CLIPScore by the judge."""
        return float(np.mean(self.scores(self.pictures(self.latents(denoiser, steps, guidance_scale)))))

    def scores(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Each picture's CLIPScore by the judge."""
        if self._judge is None:
            raise ValueError("judge is missing; name a CLIP folder")
        return self._judge.score(list(pictures), self.prompts)

    def validator(
        self, denoiser: Denoiser, steps: int, guidance_scale: float, folder: Path
    ) -> Callable[[int], dict[str, float]]:
        """What a Trainer calls: writes ``folder/step-NNNNNN.png`` and returns the scores."""

        def validate(step: int) -> dict[str, float]:
            pictures = self.pictures(self.latents(denoiser, steps, guidance_scale))
            folder.mkdir(parents=True, exist_ok=True)
            grid(pictures).save(folder / f"step-{step:06d}.png")
            return {} if self._judge is None else {"clip_score": float(self.scores(pictures).mean())}

        return validate


@torch.no_grad()
def decoded_pictures(vae: AutoencoderKL, latents: Tensor) -> list[np.ndarray]:
    """uint8 (height, width, 3) each, of latents (n, C, h, w) scaled as a UNet gives them."""
    found: list[np.ndarray] = []
    for part in latents.split(BATCH):
        found += list(to_bytes(decode_scaled(vae, part)).cpu().numpy())
    return found


def decode_scaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (n, 3, height, width), float32 around [-1, 1], of latents scaled as a UNet gives them."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()


def grid(pictures: Sequence[np.ndarray], columns: int = COLUMNS) -> Image.Image:
    """The pictures, all of one size, in rows of ``columns``."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height, min(columns, len(pictures)) * width, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)
