"""When a worker tries batch sizes: while nobody wants anything, and not between one client's requests."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from catimage_accel.serve import worker
from catimage_accel.serve.draw_loop import DrawLoop
from catimage_accel.serve.messages import Draw, Drawn, Failed, Ready, Stop
from catimage_accel.serve.worker import WorkerSettings, draw_messages

PATIENCE = 60.0


@contextmanager
def running(folder: Path) -> Iterator[tuple[SimpleQueue[Any], SimpleQueue[Any]]]:
    """A worker's loop in a thread: its inbox, and what happens: what it tells, and "warm" for a batch size it tries."""
    inbox: SimpleQueue[Any] = SimpleQueue()
    told: SimpleQueue[Any] = SimpleQueue()

    class Noted(DrawLoop):
        def warm(self) -> bool:
            told.put("warm")
            return super().warm()

    settings = WorkerSettings(folder, "cpu", max_batch=4, threads=1)
    thread = threading.Thread(target=draw_messages, args=(inbox, told.put, settings, Noted))
    thread.start()
    try:
        assert isinstance(told.get(timeout=PATIENCE), Ready)
        yield inbox, told
    finally:
        inbox.put(Stop())
        thread.join(PATIENCE)
    assert not thread.is_alive()


def until_drawn(told: SimpleQueue[Any], key: str) -> list[Any]:
    seen = [told.get(timeout=PATIENCE)]
    while not (isinstance(seen[-1], Drawn) and seen[-1].key == key):
        seen.append(told.get(timeout=PATIENCE))
    return seen


def test_a_worker_that_was_just_started_warms_at_once(tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WARM_AFTER", 1e6)
    with running(tiny_catalog) as (_, told):
        assert told.get(timeout=PATIENCE) == "warm"


def test_nothing_is_tried_between_one_clients_requests(tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WARM_AFTER", PATIENCE)
    with running(tiny_catalog) as (inbox, told):
        inbox.put(Draw("0", "a dog", "dear-4", 0))
        until_drawn(told, "0")  # what was tried before it came counts for nothing
        for number in range(1, 4):
            inbox.put(Draw(str(number), "a dog", "dear-4", number))
            assert "warm" not in until_drawn(told, str(number))


def test_it_goes_on_when_nobody_asks_any_more(tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WARM_AFTER", 0.05)
    with running(tiny_catalog) as (inbox, told):
        inbox.put(Draw("0", "a dog", "dear-4", 0))
        until_drawn(told, "0")
        while told.get(timeout=PATIENCE) != "warm":
            pass


def test_a_candidate_that_is_gone_from_the_catalog_fails_its_image_only(tiny_catalog: Path) -> None:
    with running(tiny_catalog) as (inbox, told):
        inbox.put(Draw("gone", "a dog", "dear-9", 0))
        inbox.put(Draw("there", "a dog", "dear-4", 0))
        seen = until_drawn(told, "there")
        [failed] = [one for one in seen if isinstance(one, Failed)]
        assert (failed.key, failed.kind) == ("gone", "candidate")
        assert "'dear-9'" in failed.reason


def test_a_clients_long_prompt_is_no_warning_of_the_workers(tiny_catalog: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with running(tiny_catalog) as (inbox, told):
            inbox.put(Draw("long", "a crown and " * 30, "dear-4", 0))
            until_drawn(told, "long")
    assert "cut off" not in " ".join(str(one.message) for one in caught)
