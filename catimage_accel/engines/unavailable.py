"""What an engine raises when it can't run here."""

from __future__ import annotations

__all__ = ["EngineUnavailable"]


class EngineUnavailable(RuntimeError):
    """An engine that can't be built or run on this machine; one line that says why and what to do about it.

    Whoever asked goes on with the next engine.
    """
