"""What every request passes first: the token, the size of its body, and the headers of its answer."""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catimage_accel.serve.errors import ApiError

__all__ = ["HEADERS", "Guard"]

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """ASGI middleware. With a ``token``, paths under /v1 want it as a bearer token, but for pictures: their names are
    secrets themselves, and an <img> sends no token. Bodies of more than ``max_body`` bytes are refused unread."""

    def __init__(self, app: ASGIApp, *, token: str | None, max_body: int) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        refused: list[ApiError] = []

        async def send_with_headers(message: Message) -> None:
            if refused:  # the framework's own answer to a body that it could not read
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check_token(scope)
            self._check_length(scope)
            await self._app(scope, self._bounded(receive, refused), send_with_headers)
        except ApiError as error:
            refused.append(error)
        if refused:
            await _answer(refused.pop(), send_with_headers)

    def _check_token(self, scope: Scope) -> None:
        path = scope["path"]
        if self._token is None or not path.startswith("/v1/") or path.startswith("/v1/images/files/"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise ApiError(
                401, "the bearer token is missing or wrong; send it as `Authorization: Bearer TOKEN`",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_length(self, scope: Scope) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()

    def _bounded(self, receive: Receive, refused: list[ApiError]) -> Receive:
        """``receive``, which at too long a body tells ``refused`` and ends as if the client had hung up."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                refused[:] = [self._too_large()]
                return {"type": "http.disconnect"}
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers: list[tuple[bytes, Any]] = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
