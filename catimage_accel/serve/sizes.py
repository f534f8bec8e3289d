"""The picture sizes that a catalog's candidates can be asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.engines.loading import latent_size, pixels_per_latent, read_config

__all__ = ["CatalogSizes", "Size", "SizeLimits"]

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class SizeLimits:
    """Sides in pixels: multiples of ``step``, from half (``least``) to twice (``most``) what a UNet was trained on."""

    step: int
    least: int
    most: int

    @classmethod
    def of_candidate(cls, catalog: Catalog, candidate: Candidate) -> SizeLimits:
        folder = catalog.resolve_model(candidate.model)
        config = read_config(folder / candidate.unet / "config.json")
        factor = pixels_per_latent(read_config(folder / candidate.vae / "config.json"))
        step = factor * 2 ** (len(config["block_out_channels"]) - 1)
        natives = [factor * side for side in latent_size(config)]
        return cls(step, -(-max(natives) // 2 // step) * step, 2 * min(natives) // step * step)

    def __contains__(self, side: int) -> bool:
        return side % self.step == 0 and self.least <= side <= self.most

    def __str__(self) -> str:
        return f"from {self.least} to {self.most} pixels, multiples of {self.step}"


@dataclass(frozen=True)
class Size:
    """A picture's sides in pixels, None for the candidate's own; ``without`` are candidates that can't draw it."""

    height: int | None = None
    width: int | None = None
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CatalogSizes:
    """``limits`` by the candidates' names. A size that one of them takes is accepted: those draw it."""

    limits: Mapping[str, SizeLimits]

    @classmethod
    def of_catalog(cls, catalog: Catalog) -> CatalogSizes:
        return cls({candidate.name: SizeLimits.of_candidate(catalog, candidate) for candidate in catalog.candidates})

    @property
    def widest(self) -> SizeLimits:
        """From the smallest to the largest side that any candidate takes."""
        every = self.limits.values()
        return SizeLimits(
            min(one.step for one in every), min(one.least for one in every), max(one.most for one in every)
        )

    def parse(self, size: str | None, candidate: str | None = None) -> Size:
        """Of "WIDTHxHEIGHT", "auto" or None, for the candidate named if one is; ValueError for anything else."""
        if size is None or size == "auto":
            return Size()
        match = _SIZE.fullmatch(size)
        width, height = (int(side) for side in match.groups()) if match else (0, 0)
        fitting = {name for name, one in self.limits.items() if width in one and height in one}
        asked = self.limits if candidate is None else {candidate: self.limits[candidate]}
        if fitting.isdisjoint(asked):
            accepted = "; or ".join(str(one) for one in dict.fromkeys(asked.values()))
            who = "" if candidate is None else f" by candidate {candidate!r}"
            raise ValueError(f"size is {size!r}; accepted{who}: auto, or WIDTHxHEIGHT with sides {accepted}")
        return Size(height, width, frozenset(self.limits) - fitting)
