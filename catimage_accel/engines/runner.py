"""What runs a built graph, and the libraries that build and run them, each behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from catimage_accel.engines.components import Component, ShapeProfile

if TYPE_CHECKING:
    from catimage_accel.engines.cache import CacheEntry, EngineCache

__all__ = ["Runner", "Runtime"]


class Runner(Protocol):
    """One component, built for the batch sizes of its profile as they are needed."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The graph's named outputs for its named inputs, all with the same number of rows.

        Inputs are of any floating type; outputs of the graph's, in memory that no later call touches. Rows are filled
        up to the profile's next batch size and cut off again. Raises ValueError for shapes outside the
        profile, naming the shape and what the profile covers; :class:`EngineUnavailable` if the build fails.
        """
        ...

    def build(self, advance: Callable[[str], None] = lambda _: None) -> list[CacheEntry]:
        """Builds for every batch size of the profile now; ``advance`` is told what was built."""
        ...


class Runtime(Protocol):
    """A library that runs graphs."""

    name: str
    precisions: tuple[str, ...]
    rows: tuple[int, ...]
    """Batch sizes to build for; larger batches are run in pieces of the last."""
    any_size: bool
    """Whether runners also take heights, widths and tokens other than their profile's, if more slowly."""
    batch_invariant: bool
    """Whether a row's result has the same bits whatever other rows are in the batch."""

    def why_not(self, device: torch.device) -> str | None:
        """Why it can't run on ``device``, one line with the remedy; None if it can. Cheap."""
        ...

    def version(self) -> str: ...

    def runner(
        self, component: Component, profile: ShapeProfile, cache: EngineCache, device: torch.device
    ) -> Runner: ...
