"""The loop of a worker: images taken and called off between steps, and what there is to tell after each."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import replace

import torch

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.executor import Executor, Finished, Flight, Job, Step, out_of_memory
from catimage_accel.executor.flight import to_bytes
from catimage_accel.serve.messages import Draw, Drawn, Failed, FromWorker, Preview, Round

__all__ = ["DrawLoop", "in_one_line", "preview_steps", "usable_candidates"]

PREVIEW_SHARE = 0.1
"""Previews are left out where they would take more than this share of a worker's time."""

TELL_SECONDS = 0.05
"""Progress is told no more often: who hears it shares a processor with those that draw."""
WARM_BATCHES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Images together that a worker tries while it has nothing else to do."""


def in_one_line(error: Exception) -> str:
    """What an exception says, for a message to the server."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """The steps (from 1) after which to show a preview: ``previews`` of them, evenly, none after the last."""
    shown = min(previews, steps - 1)
    return frozenset(round((index + 1) * steps / (shown + 1)) for index in range(shown))


def usable_candidates(catalog: Catalog, executor: Executor) -> dict[str, str]:
    """Loads every candidate, and draws a little with those that differ in what runs, so that what is built at the first
    use is there; of those that can't be loaded or drawn with, the reason."""
    unusable = {}
    drawn = _that_differ(catalog)
    for candidate in catalog.candidates:
        try:
            executor.prepare(candidate)
            if candidate in drawn:
                _draw_briefly(executor, candidate, 1)
        except Exception as error:
            unusable[candidate.name] = in_one_line(error)
    return unusable


def _that_differ(catalog: Catalog) -> list[Candidate]:
    """One candidate for each graph or module that there is to run."""
    found = {
        (one.weights, one.engine, one.vae, tuple(one.options), one.guidance_scale > 1): one
        for one in reversed(catalog.candidates)
    }
    return list(reversed(found.values()))


def _draw_briefly(executor: Executor, candidate: Candidate, images: int) -> None:
    brief = replace(candidate, steps=min(candidate.steps, 2))
    for finished in executor.run(Job("", brief, torch.Generator().manual_seed(0)) for _ in range(images)):
        if finished.error is not None:
            raise finished.error


class DrawLoop:
    """Draws in rounds: :meth:`take` and :meth:`cancel` between them, :meth:`round` takes the next step."""

    def __init__(self, catalog: Catalog, executor: Executor) -> None:
        self._catalog = catalog
        self._executor = executor
        self._flight = Flight(executor, self._on_step)
        self._draws: dict[str, Draw] = {}
        self._refused: list[FromWorker] = []
        self._progress: dict[str, tuple[int, int]] = {}
        self._batches: list[int] = []
        self._previews: list[Step] = []
        self._told = 0.0
        self._drawing_seconds = self._preview_seconds = 0.0
        self._to_warm = [
            (candidate, images)
            for images in WARM_BATCHES if images <= executor.max_batch
            for candidate in _that_differ(catalog)
        ]  # fmt: skip

    @property
    def idle(self) -> bool:
        return self._flight.idle and not self._refused

    def warm(self) -> bool:
        """Draws a little with one more batch size, whose first use would hold images up; False if all are warm."""
        if not self._to_warm:
            return False
        candidate, images = self._to_warm.pop(0)
        # What can't be drawn with is known from before, and what is too large a batch the executor halves.
        with contextlib.suppress(Exception):
            _draw_briefly(self._executor, candidate, images)
        return True

    def take(self, draw: Draw) -> None:
        try:
            candidate = self._catalog.candidate(draw.candidate)
        except ValueError as error:  # the catalog was changed since the server read it
            self._refused.append(Failed(draw.key, "candidate", in_one_line(error)))
            return
        self._draws[draw.key] = draw
        generator = torch.Generator().manual_seed(draw.seed)
        self._flight.take(
            Job(draw.prompt, candidate, generator, key=draw.key, height=draw.height, width=draw.width)
        )  # fmt: skip

    def cancel(self, key: str) -> None:
        if self._draws.pop(key, None) is not None:
            self._flight.cancel(key)

    def round(self) -> list[FromWorker]:
        """Takes a step; what there is to tell after it."""
        started = time.perf_counter()
        outcomes = self._refused + [self._outcome(finished) for finished in self._flight.advance()]
        self._refused = []
        self._drawing_seconds += time.perf_counter() - started
        previews = self._decoded_previews()
        self._previews.clear()
        told: list[FromWorker] = []
        if outcomes or previews or started - self._told > TELL_SECONDS:
            self._told = started
            # A batch of n was noted n times.
            sizes = {size: self._batches.count(size) // size for size in set(self._batches)}
            told.append(Round(dict(self._progress), tuple(size for size in sizes for _ in range(sizes[size]))))
            self._progress.clear()
            self._batches.clear()
        return told + previews + outcomes

    def _on_step(self, step: Step) -> None:
        key = step.job.key
        self._progress[key] = (step.index + 1, step.steps)
        self._batches.append(step.batch)
        previews = self._draws[key].previews
        if previews and step.index + 1 in preview_steps(previews, step.steps):
            self._previews.append(step)

    def _outcome(self, finished: Finished) -> FromWorker:
        self._draws.pop(finished.key)
        if finished.image is not None:
            return Drawn(finished.key, finished.image, finished.milliseconds)
        error = finished.error or RuntimeError("no image, and no error")
        return Failed(finished.key, "memory" if out_of_memory(error) else "candidate", in_one_line(error))

    def _decoded_previews(self) -> list[FromWorker]:
        """Previews of this round; a preview that can't be made is none, and costs its image nothing."""
        told: list[FromWorker] = []
        for step in self._previews:
            if self._preview_seconds > PREVIEW_SHARE * self._drawing_seconds:
                break
            started = time.perf_counter()
            try:
                engine, _ = self._executor.prepare(step.job.candidate)
                with torch.inference_mode():
                    pixels = to_bytes(engine.decode(step.denoised[None], step.job.candidate.vae))[0]
                told.append(Preview(step.job.key, step.index + 1, pixels.cpu().numpy()))
            except Exception as error:
                warnings.warn(f"no preview of {step.job.candidate.name}: {error}", stacklevel=2)
            self._preview_seconds += time.perf_counter() - started
        return told
