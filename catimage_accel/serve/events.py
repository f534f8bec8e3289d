"""One request's stream of server-sent events, bounded however slowly the client reads."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["DONE", "EventBuffer", "event_bytes"]

DONE = b"data: [DONE]\n\n"


def event_bytes(event: dict[str, Any]) -> bytes:
    """One event on the wire, named as its type."""
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


class EventBuffer:
    """Events that wait to be sent, in the order they came; a newer one replaces an unsent one of its ``slot``.

    A slot is what a slow reader needs the last of only: progress, and the preview, of one image.
    """

    def __init__(self) -> None:
        self._events: OrderedDict[Any, dict[str, Any]] = OrderedDict()
        self._number = 0
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, event: dict[str, Any], slot: tuple[Any, ...] | None = None) -> None:
        """Adds an event; with a ``slot``, in place of the one that waits there."""
        self._number += 1
        key = slot if slot is not None else self._number
        self._events.pop(key, None)
        self._events[key] = event
        self._changed.set()

    def close(self) -> None:
        """No more will come."""
        self._closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            while self._events:
                yield self._events.popitem(last=False)[1]
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()
