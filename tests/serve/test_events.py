"""Streams that stay bounded, however slowly they are read."""

from __future__ import annotations

import asyncio
from typing import Any

from catimage_accel.serve.events import EventBuffer, event_bytes


def drained(buffer: EventBuffer) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        return [event async for event in buffer]

    return asyncio.run(main())


def test_a_slow_reader_gets_the_last_of_what_only_the_last_counts_of() -> None:
    buffer = EventBuffer()
    buffer.put({"type": "routed"})
    for step in range(1000):
        buffer.put({"type": "progress", "step": step}, ("progress", 0))
        buffer.put({"type": "progress", "step": step + 1}, ("progress", 1))
    buffer.put({"type": "completed"})
    buffer.close()
    assert drained(buffer) == [
        {"type": "routed"}, {"type": "progress", "step": 999}, {"type": "progress", "step": 1000},
        {"type": "completed"},
    ]  # fmt: skip


def test_a_quick_reader_gets_all() -> None:
    async def main() -> list[int]:
        buffer, seen = EventBuffer(), []

        async def read() -> None:
            async for event in buffer:
                seen.append(event["step"])

        reader = asyncio.create_task(read())
        for step in range(5):
            buffer.put({"type": "progress", "step": step}, ("progress", 0))
            await asyncio.sleep(0.001)
        buffer.close()
        await reader
        return seen

    assert asyncio.run(main()) == list(range(5))


def test_line_breaks_in_texts_do_not_end_an_event() -> None:
    sent = event_bytes({"type": "error", "message": "one\n\ndata: two\r\n"})
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 3
