"""Other ways for a server's worker to draw, to compare step-level batching with: same routes, queue and HTTP."""

from __future__ import annotations

import time
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_executor import SCHEDULERS
from diffusers import StableDiffusionPipeline

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.engines.loading import load_unet, load_vae
from catimage_accel.executor import Executor, Job
from catimage_accel.serve.draw_loop import DrawLoop
from catimage_accel.serve.messages import Draw, Drawn, Failed, FromWorker, Round
from catimage_accel.serve.worker import WorkerSettings, run_worker


class _Queue:
    """Images that wait in the worker, oldest first; a round draws some of them to their end."""

    def __init__(self, catalog: Catalog, executor: Executor) -> None:
        self.catalog, self.executor = catalog, executor
        self.waiting: list[Draw] = []
        self._warm = DrawLoop(catalog, executor).warm

    @property
    def idle(self) -> bool:
        return not self.waiting

    def warm(self) -> bool:
        return self._warm()

    def take(self, draw: Draw) -> None:
        self.waiting.append(draw)

    def cancel(self, key: str) -> None:
        self.waiting = [draw for draw in self.waiting if draw.key != key]

    def round(self) -> list[FromWorker]:
        raise NotImplementedError


class CandidateBatches(_Queue):
    """The executor and its engines, but a batch is of one candidate, and drawn to its end before the next begins: the
    oldest image's candidate, and all that wait for the same one."""

    def round(self) -> list[FromWorker]:
        name = self.waiting[0].candidate
        batch = [draw for draw in self.waiting if draw.candidate == name][: self.executor.max_batch]
        self.waiting = [draw for draw in self.waiting if draw not in batch]
        candidate = self.catalog.candidate(name)
        jobs = [Job(one.prompt, candidate, torch.Generator().manual_seed(one.seed), key=one.key) for one in batch]
        told: list[FromWorker] = [Round({}, (len(batch),) * candidate.steps)]
        for done in self.executor.run(jobs):
            if done.image is None:
                told.append(Failed(done.key, "candidate", str(done.error)))
            else:
                told.append(Drawn(done.key, done.image, done.milliseconds))
        return told


class OneAtATime(_Queue):
    """Diffusers' own pipeline in float32, request by request; INT8 candidates by the weights they were made of."""

    def __init__(self, catalog: Catalog, executor: Executor) -> None:
        super().__init__(catalog, executor)
        self._schedulers: dict[str, Any] = {}
        self._warm = lambda: False

    def round(self) -> list[FromWorker]:
        draw = self.waiting.pop(0)
        candidate = self.catalog.candidate(draw.candidate)
        pipe = _pipeline(self.catalog.resolve_model(candidate.model), candidate.unet, candidate.vae)
        if candidate.name not in self._schedulers:
            self._schedulers[candidate.name] = SCHEDULERS[candidate.sampler].from_config(pipe.scheduler.config)
        pipe.scheduler = self._schedulers[candidate.name]
        began = time.perf_counter()
        pixels = _drawn(pipe, candidate, draw)
        milliseconds = (time.perf_counter() - began) * 1000
        return [Round({}, (1,) * candidate.steps), Drawn(draw.key, pixels, milliseconds)]


def _drawn(pipe: StableDiffusionPipeline, candidate: Candidate, draw: Draw) -> np.ndarray:
    image = pipe(
        draw.prompt, num_inference_steps=candidate.steps, guidance_scale=candidate.guidance_scale,
        guidance_rescale=candidate.guidance_rescale, generator=torch.Generator().manual_seed(draw.seed),
    ).images[0]  # fmt: skip
    return np.asarray(image)


@cache
def _pipeline(model: Path, unet: str, vae: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        model, unet=load_unet(model, unet, torch.float32), vae=load_vae(model, torch.float32, vae), safety_checker=None,
        local_files_only=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_candidate_batches(connection: Connection, settings: WorkerSettings) -> None:
    run_worker(connection, settings, CandidateBatches)  # type: ignore[arg-type]


def run_one_at_a_time(connection: Connection, settings: WorkerSettings) -> None:
    run_worker(connection, settings, OneAtATime)  # type: ignore[arg-type]
