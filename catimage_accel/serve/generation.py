"""What one call of the Images API asks for, drawn at once or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import Request

from catimage_accel.serve.api import GenerateRequest, ImageFields, ImagesAnswer
from catimage_accel.serve.errors import ApiError, described
from catimage_accel.serve.events import DONE, EventBuffer, event_bytes
from catimage_accel.serve.messages import Preview
from catimage_accel.serve.pictures import OutputFormat, encode
from catimage_accel.serve.service import ImageRequest, Observer, Picture, Routed, ServedRoute, Service

__all__ = ["Generation", "while_connected"]

_Result = TypeVar("_Result")
_Link = Callable[[bytes, OutputFormat], str]


class Generation:
    """The images of one request. ``link`` stores a file and returns its URL; ``first`` is an image's request without
    its seed, ``routed`` what the router makes of it."""

    def __init__(
        self, body: GenerateRequest, first: ImageRequest, routed: Routed, service: Service, link: _Link
    ) -> None:
        self._routed = routed
        self._service = service
        self._link = link
        self._format: OutputFormat = body.output_format or "png"
        self._as_url = body.response_format == "url" and not body.stream
        self._progress = bool(body.progress)
        self._created = int(time.time())
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        self._requests = [
            replace(first, seed=(seed + index) % 2**32) for index in range(body.n or 1)
        ]  # fmt: skip

    async def all(self) -> ImagesAnswer:
        """All images; if one of them fails the others are called off, and its error is raised."""
        pictures = await _together(self._service.draw(request, routed=self._routed) for request in self._requests)
        files = [await asyncio.to_thread(encode, picture.pixels, self._format) for picture in pictures]
        data = [
            ImageFields(
                **({"url": self._link(file, self._format)} if self._as_url else {"b64_json": _base64(file)}),
                seed=picture.seed, route=picture.route,
            )
            for picture, file in zip(pictures, files, strict=True)
        ]  # fmt: skip
        return ImagesAnswer(
            created=self._created, data=data, size=_size(pictures[0].pixels), output_format=self._format
        )  # fmt: skip

    async def stream(self) -> AsyncIterator[bytes]:
        """The events, as they come; closing the iterator calls the images off."""
        buffer = EventBuffer()
        work = asyncio.create_task(self._into(buffer))
        try:
            async for event in buffer:
                yield event_bytes(event)
            yield DONE
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _into(self, buffer: EventBuffer) -> None:
        async def one(index: int, request: ImageRequest) -> None:
            observer = _Streamer(index, self, buffer)
            picture = await self._service.draw(request, observer, routed=self._routed)
            buffer.put(await self._completed(index, picture))

        try:
            await _together(one(index, request) for index, request in enumerate(self._requests))
        except Exception as error:
            buffer.put({"type": "error", **described(error, self._service).body})
        finally:
            buffer.close()

    async def _completed(self, index: int, picture: Picture) -> dict[str, Any]:
        file = await asyncio.to_thread(encode, picture.pixels, self._format)
        return {
            **self._image_event("image_generation.completed", index, file, _size(picture.pixels)),
            "usage": None, "seed": picture.seed, "route": asdict(picture.route),
        }  # fmt: skip

    def _image_event(self, kind: str, index: int, file: bytes, size: str) -> dict[str, Any]:
        return {
            "type": kind, "b64_json": _base64(file), "image_index": index, "created_at": self._created, "size": size,
            "output_format": self._format, "quality": "auto", "background": "opaque",
        }  # fmt: skip


class _Streamer(Observer):
    """Turns what one image is told of into events."""

    def __init__(self, index: int, generation: Generation, buffer: EventBuffer) -> None:
        self._index, self._generation, self._buffer = index, generation, buffer
        self._shown = 0

    def queued(self, depth: int) -> None:
        self._put("image_generation.queued", queue_depth=depth)

    def routed(self, route: ServedRoute) -> None:
        seed = self._generation._requests[self._index].seed
        self._put("image_generation.routed", seed=seed, route=asdict(route))

    def progress(self, step: int, steps: int) -> None:
        self._put("image_generation.progress", slot=("progress", self._index), step=step, steps=steps)

    def preview(self, preview: Preview) -> None:
        file = encode(preview.pixels, self._generation._format)
        event = self._generation._image_event(
            "image_generation.partial_image", self._index, file, _size(preview.pixels)
        )  # fmt: skip
        self._buffer.put({**event, "partial_image_index": self._shown}, ("preview", self._index))
        self._shown += 1

    def _put(self, kind: str, slot: tuple[Any, ...] | None = None, **fields: Any) -> None:
        if self._generation._progress:
            self._buffer.put({"type": kind, "image_index": self._index, **fields}, slot)


async def _together(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """All results; if one of them fails the others are called off, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        # Errors are answered by their class, which that of a group would hide.
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of ``work``, which is cancelled as soon as the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has hung up")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _size(pixels: Any) -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
