"""``catimage serve``: pictures over HTTP."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from catimage_accel.cli.console import say

TOKEN_VARIABLE = "CATIMAGE_TOKEN"


def serve(
    catalog: Annotated[str, typer.Option(help="A catalog's folder, a hub id, or the built-in emoji.")] = "emoji",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8000,
    device: Annotated[str | None, typer.Option(help="Default: every CUDA device, or the CPU.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one a device.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images stepped together in a worker, at most.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Images that may wait; more are answered 429.")] = 256,
    reproducible: Annotated[
        bool | None,
        typer.Option(help="Pictures have the same bits whatever is drawn beside them. Default: on a processor."),
    ] = None,
    latency_target: Annotated[
        float, typer.Option(min=0, help="Seconds that 95 of 100 images are to take: as the wait comes near it, "
                            "cheaper candidates draw. 0: load changes no route.")
    ] = 10.0,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with a bearer token that clients must send; else ${TOKEN_VARIABLE}.")
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="What URLs of pictures begin with, where a proxy is in front.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Serve with Ray: replicas on this machine or a cluster.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="The cluster's; default: one on this machine, or a new one while this lasts.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="With --ray: GB of one of the cluster's GPUs.")] = 24.0,
    drain_seconds: Annotated[float, typer.Option(min=1, help="Most that ending waits for accepted requests.")] = 120.0,
) -> None:  # fmt: skip
    """Serve pictures over HTTP, with OpenAI's Images API, and a page to try it.

    SIGTERM or Ctrl-C ends it: nothing new is accepted, what was accepted is finished.
    """
    if ray or ray_address is not None:
        _on_ray(catalog, host, port, max_batch, max_queue, latency_target, _token(token_file), ray_address, gpu_memory)
        return
    try:
        from catimage_accel.serve.server import ServeSettings
        from catimage_accel.serve.server import serve as run
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: `pip install catimage-accel[serve]`") from error
    from catimage_accel.catalog import Catalog

    logging.basicConfig(level=logging.WARNING, format="catimage: %(message)s")
    settings = ServeSettings(
        host=host, port=port, device=device, workers=workers, max_batch=max_batch, max_queue=max_queue,
        reproducible=reproducible, latency_target=latency_target or None, token=_token(token_file),
        public_url=public_url, drain_seconds=drain_seconds,
    )  # fmt: skip
    if settings.token is None and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anyone who reaches {host}:{port} may draw; --token-file or ${TOKEN_VARIABLE} asks for a token")
    run(
        Catalog.load(catalog), settings,
        started=lambda url: say(f"{url} (page), {url}/docs (API); loading models"),
        ready=lambda unusable: say(_ready(unusable)),
    )  # fmt: skip


def _on_ray(
    catalog: str, host: str, port: int, max_batch: int, max_queue: int, latency_target: float, token: str | None,
    address: str | None, gpu_memory: float,
) -> None:  # fmt: skip
    try:
        from catimage_accel.serve.ray_app import RaySettings, serve_on_ray
    except ImportError as error:
        raise ImportError(f"serving with Ray needs {error.name}: `pip install catimage-accel[ray]`") from error
    from catimage_accel.catalog import Catalog

    settings = RaySettings(
        address=address, host=host, port=port, max_batch=max_batch, max_queue=max_queue,
        latency_target=latency_target or None, token=token, gpu_gb=gpu_memory,
    )  # fmt: skip
    say("starting on Ray; models are loaded")
    serve_on_ray(Catalog.load(catalog), settings, started=lambda url: say(f"ready: {url} (page), {url}/docs (API)"))


def _ready(unusable: dict[str, str]) -> str:
    left_out = "".join(f"; left out: {name} ({reason})" for name, reason in unusable.items())
    return f"ready{left_out}"


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    token = file.read_text().strip()
    if not token:
        raise ValueError(f"{file} is empty; accepted: a file with the token")
    return token
