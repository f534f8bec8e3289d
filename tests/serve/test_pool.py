"""Real worker processes: drawn with, called off, killed, stalled."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catimage_accel.serve.backend import NoWorker, WorkerLost
from catimage_accel.serve.draw_loop import preview_steps
from catimage_accel.serve.messages import Draw, Preview
from catimage_accel.serve.pool import WorkerPool
from catimage_accel.serve.worker import WorkerSettings


def with_pool(
    folder: Path, body: Callable[[WorkerPool], Awaitable[Any]], workers: int = 1, max_batch: int = 2, **options: Any
) -> Any:
    async def main() -> Any:
        settings = [WorkerSettings(folder, "cpu", max_batch, threads=1, reproducible=True)] * workers
        pool = WorkerPool(settings, **options)
        try:
            await asyncio.wait_for(pool.start(), 120)
            return await asyncio.wait_for(body(pool), 120)
        finally:
            await pool.stop()

    return asyncio.run(main())


def draw(key: str, seed: int = 0, **more: Any) -> Draw:
    return Draw(key, f"{seed} dogs", "dear-4", seed, **more)


def test_what_is_drawn_beside_an_image_does_not_change_it(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        alone = [(await pool.draw(draw(f"alone {seed}", seed))).pixels for seed in range(6)]
        crowd = await asyncio.gather(*(pool.draw(draw(f"crowd {seed}", seed)) for seed in range(6)))
        for one, other in zip(alone, crowd, strict=True):
            assert np.array_equal(one, other.pixels)

    with_pool(tiny_catalog, body)


def test_previews_lead_to_the_picture(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        previews: list[Preview] = []
        steps: list[tuple[int, int]] = []
        drawn = await pool.draw(draw("one", previews=2), lambda *told: steps.append(told), previews.append)
        assert steps[-1] == (4, 4)
        # How many there is time for depends on the machine: at least the first, for nothing was spent before.
        assert [preview.step for preview in previews][:1] == [1]
        assert all(preview.pixels.shape == drawn.pixels.shape for preview in previews)

    with_pool(tiny_catalog, body)


@pytest.mark.parametrize(
    ("previews", "steps", "expected"),
    [(0, 8, set()), (1, 8, {4}), (3, 8, {2, 4, 6}), (16, 4, {1, 2, 3}), (5, 1, set())],
    ids=["none", "half-way", "evenly", "after-each-but-the-last", "a-single-step"],
)
def test_preview_steps(previews: int, steps: int, expected: set[int]) -> None:
    assert preview_steps(previews, steps) == expected


def test_a_killed_worker_fails_its_images_and_is_replaced(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        await pool.draw(draw("warm"))
        [pid] = pool.pids
        os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(pool.draw(draw(str(seed), seed))) for seed in range(3)]
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, WorkerLost) for outcome in outcomes)
        assert "exit code -9" in str(outcomes[0])
        assert (await pool.draw(draw("after"))).pixels.shape == (64, 64, 3)
        assert pool.restarts == 1
        assert pool.pids != [pid]

    with_pool(tiny_catalog, body)


def test_a_silent_worker_is_killed_and_replaced(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        await pool.draw(draw("warm"))
        os.kill(pool.pids[0], signal.SIGSTOP)
        with pytest.raises(WorkerLost):
            await pool.draw(draw("stalled"))
        assert (await pool.draw(draw("after"))).pixels.shape == (64, 64, 3)

    with_pool(tiny_catalog, body, stall_seconds=3.0)


def test_an_idle_worker_may_be_silent(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        await pool.draw(draw("one"))
        await asyncio.sleep(2.5)
        assert pool.restarts == 0

    with_pool(tiny_catalog, body, stall_seconds=1.0)


def test_alone_means_alone(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        sizes: list[int] = []
        pool.watch(lambda told: sizes.extend(told.batches))
        before = [asyncio.create_task(pool.draw(draw(f"before {seed}", seed))) for seed in range(3)]
        await asyncio.sleep(0)
        lone = asyncio.create_task(pool.draw(draw("lone"), alone=True))
        await asyncio.sleep(0)
        after = [asyncio.create_task(pool.draw(draw(f"after {seed}", seed))) for seed in range(3)]
        await asyncio.gather(*before, lone, *after)
        assert 1 in sizes
        # Those that came later waited, and nothing is held back for good.
        assert (await pool.draw(draw("last"))).pixels.shape == (64, 64, 3)

    with_pool(tiny_catalog, body)


def test_a_cancelled_draw_leaves_the_others_and_frees_the_worker(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> None:
        expected = (await pool.draw(draw("expected", 1))).pixels
        tasks = [asyncio.create_task(pool.draw(draw(str(seed), seed))) for seed in range(8)]
        await asyncio.sleep(0.02)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert np.array_equal(outcomes[1].pixels, expected)
        lone = await pool.draw(draw("lone", 1), alone=True)
        assert np.array_equal(lone.pixels, expected)

    with_pool(tiny_catalog, body)


def test_workers_end_with_their_server(tiny_catalog: Path) -> None:
    async def body(pool: WorkerPool) -> list[int]:
        while len(pool.pids) < 2:
            await asyncio.sleep(0.05)
        return pool.pids

    pids = with_pool(tiny_catalog, body, workers=2)
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_catalog_that_cannot_be_loaded_is_told_at_the_start(tmp_path: Path) -> None:
    async def body(pool: WorkerPool) -> None: ...

    with pytest.raises(RuntimeError, match=r"catalog\.toml"):
        with_pool(tmp_path, body)


def test_a_worker_that_could_not_be_started_is_there_once_it_can(
    tiny_catalog: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def body(pool: WorkerPool) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # what is open stays so, and no more is opened
        try:
            os.kill(pool.pids[0], signal.SIGKILL)
            while sum("could not be started" in one for one in caplog.messages) < 2:
                await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert "Too many open files" in caplog.text
        assert (await pool.draw(draw("after"))).pixels.shape == (64, 64, 3)

    with caplog.at_level(logging.WARNING):
        with_pool(tiny_catalog, body)


def test_while_the_catalog_is_broken_nobody_waits_for_a_worker(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    file = folder / "catalog.toml"
    text = file.read_text()

    async def body(pool: WorkerPool) -> None:
        file.write_text(text.replace("tradeoff", "tradeof"))
        waiting = asyncio.create_task(pool.draw(draw("waits")))
        await asyncio.sleep(0)
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(WorkerLost):
            await waiting
        for alone in (False, True):
            with pytest.raises(NoWorker, match=r"catalog\.toml"):
                await pool.draw(draw("at once"), alone=alone)
        file.write_text(text)
        while not pool.workers:
            await asyncio.sleep(0.05)
        assert (await pool.draw(draw("after"))).pixels.shape == (64, 64, 3)

    with_pool(folder, body)
