"""Workers killed while people draw: nothing is lost, and no picture is another one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from serving import Server, start_server

from catimage_accel.catalog import Catalog

CANDIDATES = ("cheap-2", "middle-3", "dear-4")
PICTURES = 24


def body(number: int) -> dict[str, object]:
    return {"prompt": f"{number} dogs and a crown", "candidate": CANDIDATES[number % 3], "seed": number}


def picture(http: httpx.Client, number: int) -> tuple[int, str]:
    answer = http.post("/v1/images/generations", json=body(number))
    return answer.status_code, answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else answer.text


def kill_one(server: Server, chance: random.Random) -> bool:
    """SIGKILLs a worker in the midst of its work."""
    pids = server.worker_pids()
    # With both ready: one killed again and again before it is would be waited for longer and longer.
    if server.metric("catimage_workers") < 2 or not server.metric("catimage_in_flight"):
        return False
    try:
        os.kill(chance.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "kills", [4, pytest.param(50, marks=pytest.mark.slow)], ids=["a-few-kills", "fifty-kills"]
)  # fmt: skip
def test_no_request_is_lost_and_no_picture_changed(tiny_catalog: Path, kills: int) -> None:
    server = start_server(tiny_catalog, "--workers", "2", "--max-batch", "4", "--latency-target", "0")
    chance = random.Random(kills)
    try:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            expected = [picture(http, number) for number in range(PICTURES)]
            assert {status for status, _ in expected} == {200}
            finished = threading.Event()
            outcomes: list[tuple[int, tuple[int, str]]] = []

            def client(first: int) -> None:
                number = first
                while not finished.is_set():
                    outcomes.append((number, picture(http, number)))
                    number = (number + 5) % PICTURES

            with ThreadPoolExecutor(8) as threads:
                clients = [threads.submit(client, first) for first in range(8)]
                try:
                    done, deadline = 0, time.monotonic() + 60 + 30 * kills  # a slow machine's restart
                    while done < kills:
                        assert time.monotonic() < deadline, f"only {done} kills"
                        done += kill_one(server, chance)
                        time.sleep(chance.uniform(0.0, 0.5))
                finally:
                    finished.set()
                for one in clients:
                    one.result()
        wrong = [(number, got[0], got[1][:200]) for number, got in outcomes if got != expected[number]]
        assert not wrong
        assert len(outcomes) > kills
        assert server.metric("catimage_worker_restarts") >= kills * 0.9
        assert server.metric("catimage_queue_depth") == server.metric("catimage_in_flight") == 0
    finally:
        assert server.stop() == 0


def test_a_catalog_that_is_changed_under_the_server(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))
    server = start_server(folder, "--latency-target", "0")

    def draw(candidate: str) -> httpx.Response:
        request = {"prompt": "a dog", "candidate": candidate}
        return httpx.post(f"{server.url}/v1/images/generations", json=request, timeout=60)

    try:
        catalog = Catalog.load(folder)
        fewer = tuple(one for one in catalog.candidates if one.name != "dear-4")
        replace(catalog, candidates=fewer).save(folder).write_checksums()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        assert draw("dear-4").json()["error"]["code"] == "drawing_failed"
        assert draw("cheap-2").status_code == 200
        assert server.metric("catimage_worker_restarts") == 1

        (folder / "catalog.toml").write_text("")
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        refused = draw("cheap-2")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
        assert str(tmp_path) not in refused.text
        assert server.says("catalog.toml"), server.lines
    finally:
        assert server.stop() == 0
