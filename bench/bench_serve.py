"""Images a second at equal latency: the server against other ways to batch, under Poisson arrivals, over HTTP.

    python bench/bench_serve.py [--catalog emoji] [--seconds 600] [--json FILE]

Prompts are held-out captions, simple and hard ones as they come; clients ask for one of five tradeoffs, so that many
candidates are in demand at once. All systems get the same requests at the same moments and, but for the last one, draw
them with the same candidates:

    diffusers   StableDiffusionPipeline in float32, one request at a time
    candidate   this package's engines, batches of one candidate, each drawn to its end
    step        `catimage serve` with step-level batches, load changing no route
    load        the same with a latency target: load-aware routing

Each system meets rising rates until its 95th percentile passes the greatest target. Its throughput at a target is read
off the line between the rates around it. What is refused (429) counts as never there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn
from serving.baselines import run_candidate_batches, run_one_at_a_time

from catimage_accel.catalog import Catalog
from catimage_accel.kernels.device import device_name
from catimage_accel.serve.app import AppSettings, create_app
from catimage_accel.serve.pool import WorkerPool
from catimage_accel.serve.server import ServeSettings, worker_settings
from catimage_accel.serve.service import Service
from catimage_accel.serve.worker import WorkerSettings, run_worker
from catimage_accel.storage import write_atomic
from catimage_accel.zoo.training.data import held_out_captions

TRADEOFFS = (0.0, 0.02, 0.05, 0.2, 1.0)
TARGETS = (1.0, 2.0, 4.0)
FIRST_CAPTION = 50_000
QUEUE = 400


@dataclass(frozen=True)
class System:
    name: str
    target: Callable[[Connection, WorkerSettings], None]
    own_queue: bool = False
    """Whether the worker itself chooses among all that wait."""
    latency_target: float | None = None


SYSTEMS = (
    System("diffusers", run_one_at_a_time, own_queue=True),
    System("candidate", run_candidate_batches, own_queue=True),
    System("step", run_worker),
    System("load", run_worker, latency_target=TARGETS[1]),
)


@dataclass(frozen=True)
class Point:
    """One system at one rate: images asked for a second, finished a second, latency in seconds."""

    system: str
    rate: float
    throughput: float
    p50: float
    p95: float
    p99: float
    refused: int
    images: int
    images_a_step: float
    predicted_quality: float


@dataclass(frozen=True)
class Request:
    at: float
    prompt: str
    tradeoff: float
    seed: int


def trace(rate: float, seconds: float, captions: Sequence[str]) -> list[Request]:
    """Poisson arrivals; the same for every system."""
    rng = np.random.default_rng(int(rate * 1000))
    moments = np.cumsum(rng.exponential(1 / rate, int(2 * rate * seconds) + 20))
    return [
        Request(float(at), captions[int(rng.integers(len(captions)))], float(rng.choice(TRADEOFFS)), index)
        for index, at in enumerate(moments[moments < seconds])
    ]


async def offered(http: httpx.AsyncClient, requests: Sequence[Request]) -> tuple[list[float], list[float], int, float]:
    """Latencies and predicted qualities of what was drawn, how much was refused, and the seconds until all was done."""
    began = time.perf_counter()
    latencies: list[float] = []
    qualities: list[float] = []
    refused = 0

    async def one(request: Request) -> None:
        nonlocal refused
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
        body = {"prompt": request.prompt, "tradeoff": request.tradeoff, "seed": request.seed}
        answer = await http.post("/v1/images/generations", json=body)
        if answer.status_code == 429:
            refused += 1
            return
        answer.raise_for_status()
        latencies.append(time.perf_counter() - began - request.at)
        route = answer.json()["data"][0]["route"]
        qualities.append(route["predicted_quality"][route["candidate"]])

    await asyncio.gather(*(one(request) for request in requests))
    return latencies, qualities, refused, time.perf_counter() - began


async def measured(
    system: System, catalog: Catalog, seconds: float, captions: Sequence[str], options: argparse.Namespace
) -> list[Point]:
    settings = ServeSettings(max_batch=options.max_batch)
    pool = WorkerPool(worker_settings(catalog, settings), target=system.target)
    if system.own_queue:
        pool.capacity = QUEUE
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as pictures:
        service = Service(catalog, pool, max_queue=QUEUE, latency_target=system.latency_target)
        app = create_app(service, AppSettings(Path(pictures)))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not (server.started and service.ready):
            await asyncio.sleep(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as http:
            for candidate in catalog.candidates:  # weights are read and engines built
                body = {"prompt": "a dog", "candidate": candidate.name, "n": 4}
                (await http.post("/v1/images/generations", json=body)).raise_for_status()
            await asyncio.sleep(options.warm)
            for rate in options.rates:
                before = _batches(service)
                latencies, qualities, refused, took = await offered(http, trace(rate, seconds, captions))
                calls, rows = (after - was for after, was in zip(_batches(service), before, strict=True))
                p50, p95, p99 = (float(np.quantile(latencies, share)) for share in (0.5, 0.95, 0.99))
                points.append(
                    Point(system.name, rate, len(latencies) / took, p50, p95, p99, refused, len(latencies),
                          rows / max(calls, 1), float(np.mean(qualities)))
                )  # fmt: skip
                show(points[-1])
                if p95 > TARGETS[-1] or refused:
                    break
        server.should_exit = True
        await serving
    return points


def _batches(service: Service) -> tuple[float, float]:
    """(batched steps, images in them) so far."""
    found = {sample.name: sample.value for metric in service.metrics.batch.collect() for sample in metric.samples}
    return found["catimage_batch_images_count"], found["catimage_batch_images_sum"]


def at_target(points: Sequence[Point], target: float) -> float:
    """Images a second of which 95 in 100 take no more than ``target``: between the last rate that keeps it and the
    first that does not, by the line through both (in the logarithm of latency). 0 if none keeps it."""
    keeping = [point for point in points if point.p95 <= target and not point.refused]
    if not keeping:
        return 0.0
    last = max(keeping, key=lambda point: point.rate)
    after = [point for point in points if point.rate > last.rate]
    if not after:
        return last.throughput
    first = min(after, key=lambda point: point.rate)
    share = (np.log(target) - np.log(last.p95)) / max(np.log(first.p95) - np.log(last.p95), 1e-9)
    return float(last.throughput + min(max(share, 0.0), 1.0) * max(first.throughput - last.throughput, 0.0))


def show(point: Point) -> None:
    print(
        f"{point.system:10} {point.rate:5.1f} images/s asked  {point.throughput:5.2f} drawn  p50 {point.p50:6.2f}  "
        f"p95 {point.p95:6.2f}  p99 {point.p99:6.2f} s  {point.images_a_step:4.1f} images a step  "
        f"quality {point.predicted_quality:.4f}  refused {point.refused}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="emoji")
    parser.add_argument("--seconds", type=float, default=600.0, help="about how long all of it may take")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 4, 6, 8, 10, 12, 14, 17, 20, 24, 28])
    parser.add_argument("--systems", nargs="+", default=[system.name for system in SYSTEMS])
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--warm", type=float, default=45.0, help="seconds in which a worker tries its batch sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    catalog = Catalog.load(options.catalog)
    captions = [text for _, text in held_out_captions(400, FIRST_CAPTION)]
    chosen = [system for system in SYSTEMS if system.name in options.systems]
    # About half of the rates are met before a system is beyond the last target.
    seconds = options.seconds / (len(chosen) * len(options.rates) * 0.6)
    points: list[Point] = []
    for system in chosen:
        points += asyncio.run(measured(system, catalog, seconds, captions, options))
    throughput = {
        system.name: {
            f"{target:g} s": round(at_target([one for one in points if one.system == system.name], target), 3)
            for target in TARGETS
        }
        for system in chosen
    }
    print(f"\nimages a second with a 95th percentile of at most {', '.join(f'{t:g} s' for t in TARGETS)}:")
    for name, by_target in throughput.items():
        base = throughput.get("candidate", {})
        ratios = [f"{value / base[key]:.2f}x" if base.get(key) else "-" for key, value in by_target.items()]
        print(
            f"{name:10} "
            + "  ".join(f"{value:6.2f} ({r})" for value, r in zip(by_target.values(), ratios, strict=True))
        )
    if options.json:
        device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        record = {
            "command": " ".join(["python", *sys.argv]), "device": device, "threads": torch.get_num_threads(),
            "processor": platform.processor(), "cores": os.cpu_count(), "tradeoffs": TRADEOFFS,
            "seconds_a_rate": seconds, "max_batch": options.max_batch, "throughput": throughput,
            "points": [asdict(point) for point in points],
        }  # fmt: skip
        write_atomic(options.json, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
