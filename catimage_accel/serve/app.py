"""The HTTP application over a service."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from catimage_accel.serve.api import (
    CatalogFields,
    GenerateRequest,
    ImagesAnswer,
    ModelFields,
    ModelsAnswer,
    RouteAnswer,
    RouteRequest,
)
from catimage_accel.serve.errors import ApiError, add_error_handlers
from catimage_accel.serve.generation import Generation, while_connected
from catimage_accel.serve.pictures import OutputFormat, PictureStore
from catimage_accel.serve.security import Guard
from catimage_accel.serve.service import ImageRequest, Service
from catimage_accel.serve.sizes import CatalogSizes, Size

__all__ = ["AppSettings", "create_app"]

PAGE = Path(__file__).parent / "page"
DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>catimage: HTTP API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/assets/swagger-ui.css"></head>
<body><div id="docs"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script><script src="/page/docs.js"></script></body></html>
"""


@dataclass(frozen=True)
class AppSettings:
    """``pictures`` is the folder for what "url" answers point to, each for ``picture_seconds``; None: there are none.
    ``public_url`` is what those URLs begin with, None: as the client called. ``token`` None: anyone may draw."""

    pictures: Path | None
    token: str | None = None
    public_url: str | None = None
    max_body: int = 64 * 1024
    picture_seconds: float = 3600.0


def create_app(service: Service, settings: AppSettings) -> ASGIApp:
    """The application; starting it starts the service's backend, which is ready a while later."""
    app = FastAPI(
        title="catimage", summary="Draws every prompt with the cheapest candidate that draws it well.",
        lifespan=_lifespan(service), docs_url=None, redoc_url=None,
    )  # fmt: skip
    add_error_handlers(app, service)
    store = None
    if settings.pictures is not None:
        store = PictureStore(settings.pictures, seconds=settings.picture_seconds)
    sizes = CatalogSizes.of_catalog(service.catalog)
    _add_images(app, service, settings, store, sizes)
    _add_models(app, service, sizes)
    _add_operations(app, service)
    _add_pages(app)
    # Outside of the framework's own middleware, which answers some errors itself.
    return Guard(app, token=settings.token, max_body=settings.max_body)


def _lifespan(service: Service):  # type: ignore[no-untyped-def]
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.backend.start())
        try:
            yield
        finally:
            service.draining = True
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await service.backend.stop()

    return lifespan


def _add_images(
    app: FastAPI, service: Service, settings: AppSettings, store: PictureStore | None, sizes: CatalogSizes
) -> None:  # fmt: skip
    errors: dict[int | str, dict[str, str]] = {
        400: {"description": "The request is wrong; the error says where."},
        401: {"description": "The token is missing or wrong."},
        408: {"description": "The image could not be drawn by its deadline."},
        413: {"description": "The body is too large."},
        429: {"description": "Too many images wait; Retry-After says when to try again."},
        503: {"description": "The server is shutting down, or no worker can load the catalog."},
    }

    @app.post("/v1/images/generations", responses=errors, tags=["images"])
    async def generate(body: GenerateRequest, request: Request) -> ImagesAnswer:
        """Draws `n` images of the prompt. With `stream`, the answer is a stream of server-sent events."""
        named = _named(body, service)
        policy = body.policy(named)
        size = _parsed(sizes, body.size, named)
        if body.response_format == "url" and store is None:
            raise ApiError(400, "response_format is 'url'; accepted here: b64_json", param="response_format")
        loop = asyncio.get_running_loop()
        # What is wrong is told before anything is sent.
        routed = await service.routed(body.prompt, policy, size.without)
        service.admission.check_room(body.n or 1)
        first = ImageRequest(
            body.prompt, policy, height=size.height, width=size.width, without=size.without,
            previews=(body.partial_images or 0) if body.stream else 0, client=_client(body, request),
            deadline=None if body.deadline_ms is None else loop.time() + body.deadline_ms / 1000,
        )  # fmt: skip

        def link(file: bytes, output_format: OutputFormat) -> str:
            assert store is not None  # else refused above
            base = settings.public_url or str(request.base_url)
            return f"{base.rstrip('/')}/v1/images/files/{store.add(file, output_format)}"

        generation = Generation(body, first, routed, service, link)
        if body.stream:
            return StreamingResponse(generation.stream(), media_type="text/event-stream")  # type: ignore[return-value]
        return await while_connected(request, generation.all())

    @app.post("/v1/routes", responses={400: errors[400], 401: errors[401]}, tags=["images"])
    async def route(body: RouteRequest) -> RouteAnswer:
        """Which candidate would draw the prompt now, and what is predicted of each; draws nothing."""
        return RouteAnswer(**asdict(await service.route(body.prompt, body.policy(_named(body, service)))))

    missing: dict[int | str, dict[str, str]] = {404: {"description": "No such picture."}}

    @app.get("/v1/images/files/{name}", response_class=FileResponse, responses=missing, tags=["images"])
    async def picture(name: Annotated[str, PathParameter(max_length=60)]) -> Response:
        """A picture that an answer with `response_format` "url" pointed to; for a while."""
        path = None if store is None else store.find(name)
        if path is None:
            raise ApiError(404, "there is no such picture, or its time is over", param="name", code="not_found")
        return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})


def _add_models(app: FastAPI, service: Service, sizes: CatalogSizes) -> None:
    created = int(time.time())

    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelsAnswer:
        """The catalog, whose name has the router choose, and its candidates."""
        catalog, routes = service.catalog, service.routes
        whole = CatalogFields(
            metric=catalog.metric, cost_unit=catalog.cost_unit, tradeoff=catalog.tradeoff,
            max_tradeoff=routes.max_tradeoff, routed=routes.routed, sizes=asdict(sizes.widest),
        )  # fmt: skip
        data = [ModelFields(id=catalog.name, created=created, catalog=whole)]
        for one in catalog.candidates:
            names = (
                "steps", "sampler", "timestep_spacing", "guidance_scale", "guidance_rescale", "lora_scale", "engine",
                "precision",
            )  # fmt: skip
            told = {key: getattr(one, key) for key in names}
            told["lora"] = None if one.lora is None else Path(one.lora).name  # not where it lies on this machine
            usable = one.name not in service.backend.unusable
            told |= {"cost": routes.costs[one.name], "usable": usable, "sizes": asdict(sizes.limits[one.name])}
            data.append(ModelFields(id=one.name, created=created, candidate=told))
        return ModelsAnswer(data=data)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_class=PlainTextResponse, tags=["operations"])
    async def healthz() -> str:
        """The process answers."""
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Not ready."}},
             tags=["operations"])  # fmt: skip
    async def readyz() -> Response:
        """Images can be drawn: models are loaded, and the server is not about to end."""
        if service.draining:
            return PlainTextResponse("draining\n", 503)
        return PlainTextResponse("ready\n") if service.ready else PlainTextResponse("loading\n", 503)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operations"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI) -> None:
    found = importlib.util.find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise ImportError("fastapi_offline is missing", name="fastapi_offline")
    app.mount("/docs/assets", StaticFiles(directory=Path(found.origin).parent / "static"))
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")


def _named(body: RouteRequest, service: Service) -> str | None:
    """The candidate that ``candidate`` or ``model`` names, None where the router is to choose."""
    names = [candidate.name for candidate in service.catalog.candidates]
    if body.candidate is not None:
        if body.candidate not in names:
            raise ApiError(
                400, f"candidate is {body.candidate!r}; accepted: {', '.join(names)}", param="candidate"
            )  # fmt: skip
        return body.candidate
    if body.model is None or body.model == service.catalog.name:
        return None
    if body.model not in names:
        raise ApiError(
            404, f"model is {body.model!r}; accepted: {service.catalog.name}, to have the router choose, or one of "
            f"{', '.join(names)}", param="model", code="model_not_found",
        )  # fmt: skip
    others = [name for name in ("tradeoff", "budget", "min_quality") if getattr(body, name) is not None]
    if others:
        raise ApiError(
            400, f"{others[0]} is given, but model {body.model!r} is a candidate; accepted: model "
            f"{service.catalog.name!r}, or no {others[0]}", param=others[0],
        )  # fmt: skip
    return body.model


def _parsed(sizes: CatalogSizes, size: str | None, candidate: str | None) -> Size:
    try:
        return sizes.parse(size, candidate)
    except ValueError as error:
        raise ApiError(400, str(error), param="size") from None


def _client(body: GenerateRequest, request: Request) -> str:
    if body.user:
        return f"user {body.user}"
    return "" if request.client is None else f"address {request.client.host}"
