"""What draws for the service: worker processes of this machine, or Ray's replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from catimage_accel.serve.messages import Draw, Drawn, Failed, Preview, Round

__all__ = ["Backend", "DrawFailed", "NoWorker", "OnPreview", "OnProgress", "OnRound", "OutOfMemory", "WorkerLost",
           "failure"]  # fmt: skip

OnProgress = Callable[[int, int], None]
"""Called with the steps done and the steps there are."""
OnPreview = Callable[[Preview], None]
OnRound = Callable[[Round], None]


class DrawFailed(RuntimeError):
    """The candidate raised while it drew this image."""


class OutOfMemory(DrawFailed):
    """There was too little memory for this image, drawn by itself."""


class WorkerLost(RuntimeError):
    """The worker that drew this image is gone, and what it had with it."""


class NoWorker(RuntimeError):
    """No worker can draw, and none of those that are started anew could when last tried."""


def failure(failed: Failed) -> DrawFailed:
    """The exception for what a worker told."""
    return (OutOfMemory if failed.kind == "memory" else DrawFailed)(failed.reason)


class Backend(Protocol):
    """Draws images, many at once."""

    capacity: int
    """Images that can be in flight together without waiting for a slot."""
    unusable: dict[str, str]
    """Candidates that can't be drawn with here, and why; known once ready."""

    async def start(self) -> None:
        """Returns when images can be drawn. RuntimeError if that will never be."""
        ...

    async def stop(self) -> None:
        """Ends all workers; what is in flight is lost."""
        ...

    @property
    def workers(self) -> int:
        """Workers that would begin an image given now."""
        ...

    @property
    def restarts(self) -> int:
        """Workers that were lost and replaced."""
        ...

    def watch(self, on_round: OnRound) -> None:
        """Has every step of every batch told to ``on_round``."""
        ...

    async def draw(
        self,
        draw: Draw,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        *,
        alone: bool = False,
    ) -> Drawn:
        """The image; with ``alone``, no other image is in its worker meanwhile.

        Cancelling the call frees the image's slot at the next step. Raises DrawFailed, OutOfMemory, WorkerLost or
        NoWorker.
        """
        ...
