"""What the server and its workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Broken", "Cancel", "Draw", "Drawn", "Failed", "FromWorker", "Preview", "Ready", "Round", "Stop", "ToWorker"]


@dataclass(frozen=True)
class Draw:
    """One image to draw: ``key`` is unique, ``candidate`` a name of the catalog, ``seed`` 0 to 2**32 - 1.

    ``height`` and ``width`` in pixels, None for the candidate's own; at most ``previews`` pictures of the way there.
    """

    key: str
    prompt: str
    candidate: str
    seed: int
    height: int | None = None
    width: int | None = None
    previews: int = 0


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this image any more."""

    key: str


@dataclass(frozen=True)
class Stop:
    """Exit now."""


@dataclass(frozen=True)
class Ready:
    """Candidates are loaded; ``unusable`` says of those that can't be, why."""

    unusable: dict[str, str]


@dataclass(frozen=True)
class Broken:
    """The worker can draw nothing at all."""

    reason: str


@dataclass(frozen=True)
class Round:
    """Steps were taken: ``progress`` is [key] (steps done, steps), ``batches`` the number of images in each step."""

    progress: dict[str, tuple[int, int]]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Preview:
    """What the image looks like after ``step`` of its steps: uint8 (height, width, 3)."""

    key: str
    step: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """The image: uint8 (height, width, 3); ``milliseconds`` since the worker took it on."""

    key: str
    pixels: np.ndarray
    milliseconds: float


@dataclass(frozen=True)
class Failed:
    """The image could not be drawn: for want of ``memory``, or because the ``candidate`` raised."""

    key: str
    kind: Literal["memory", "candidate"]
    reason: str


ToWorker = Draw | Cancel | Stop
FromWorker = Ready | Broken | Round | Preview | Drawn | Failed
