"""The picture sizes that a catalog's candidates can be asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from catimage_accel.catalog import Catalog
from catimage_accel.engines.loading import latent_size, pixels_per_latent, read_config

__all__ = ["SizeLimits"]

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class SizeLimits:
    """Sides in pixels: multiples of ``step``, from half (``least``) to twice (``most``) what UNets were trained on."""

    step: int
    least: int
    most: int

    @classmethod
    def of_catalog(cls, catalog: Catalog) -> SizeLimits:
        """For every candidate to draw whatever is accepted: which of them it will be is known later."""
        steps, natives = [], []
        for model, unet, vae in {(one.model, one.unet, one.vae) for one in catalog.candidates}:
            folder = catalog.resolve_model(model)
            config = read_config(folder / unet / "config.json")
            factor = pixels_per_latent(read_config(folder / vae / "config.json"))
            steps.append(factor * 2 ** (len(config["block_out_channels"]) - 1))
            natives += [factor * side for side in latent_size(config)]
        step = max(steps)
        return cls(step, -(-max(natives) // 2 // step) * step, 2 * min(natives) // step * step)

    def parse(self, size: str | None) -> tuple[int | None, int | None]:
        """(height, width) of "WIDTHxHEIGHT", (None, None) of "auto" or None; ValueError for anything else."""
        if size is None or size == "auto":
            return None, None
        match = _SIZE.fullmatch(size)
        width, height = (int(side) for side in match.groups()) if match else (0, 0)
        for side in (width, height):
            if side % self.step or not self.least <= side <= self.most:
                raise ValueError(
                    f"size is {size!r}; accepted: auto, or WIDTHxHEIGHT with sides from {self.least} to {self.most} "
                    f"pixels, multiples of {self.step}"
                )
        return height, width
