"""Errors as OpenAI's API words them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from catimage_accel.serve.admission import QueueFull
from catimage_accel.serve.backend import NoWorker
from catimage_accel.serve.service import DeadlineMissed, Draining, DrawingFailed, Service

__all__ = ["ApiError", "add_error_handlers", "described"]

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than 200, with the body of :func:`described`."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def described(error: BaseException, service: Service) -> ApiError:
    """What a client is told of an error; one that is nobody's fault but the server's, without its particulars."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        seconds = min(max(1, math.ceil(service.predicted_wait / 2)), 120)
        return ApiError(429, f"{error}; try again later", code="queue_full", headers={"Retry-After": str(seconds)})
    if isinstance(error, DeadlineMissed):
        # OpenAI's clients repeat a 408 unless told not to, and a second try would come too late as well.
        return ApiError(
            408, str(error), param="deadline_ms", code="deadline_missed", headers={"x-should-retry": "false"}
        )
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="draining", headers={"Retry-After": "5"})
    if isinstance(error, NoWorker):
        # Why was logged when the worker said so: it may tell of the machine.
        return ApiError(
            503, "no worker can load the catalog, which may have been changed; the server's log says why",
            code="no_worker", headers={"Retry-After": "10"},
        )  # fmt: skip
    if isinstance(error, DrawingFailed):
        logger.error("%s: %s", error, error.reason)
        return ApiError(500, str(error), code="drawing_failed", headers={"x-should-retry": "false"})
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("an answer failed", exc_info=error)
    return ApiError(500, "the server made a mistake; its log says more", code="internal")


def add_error_handlers(app: FastAPI, service: Service) -> None:
    """Has all errors of ``app`` answered as above, those of the framework too."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "there is no such parameter"
        message = f"{param or 'body'}: {reason[:1].lower()}{reason[1:]}"
        return answer(ApiError(400, message, param=param))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return answer(described(error, service))

    for kind in (ApiError, QueueFull, DeadlineMissed, Draining, NoWorker, DrawingFailed, ValueError):
        app.add_exception_handler(kind, failed)
