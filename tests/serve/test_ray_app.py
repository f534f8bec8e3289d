"""`catimage serve --ray`: the same pictures from replicas, one of which is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server, start_server

from catimage_accel.catalog import Catalog

pytestmark = pytest.mark.slow  # Ray takes half a minute to be there


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def two_models(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny catalog, of which one candidate has a model folder of its own."""
    folder = tmp_path_factory.mktemp("two-models") / "catalog"
    shutil.copytree(tiny_catalog, folder)
    shutil.copytree(folder / "model", folder / "other")
    catalog = Catalog.load(folder, verify=False)
    cheap, *others = catalog.candidates
    replace(catalog, candidates=(replace(cheap, model="other"), *others)).save(folder)
    catalog.write_checksums()
    return folder


@pytest.fixture(scope="module")
def on_ray(two_models: Path) -> Iterator[Server]:
    running = start_server(two_models, "--ray", "--port", str(free_port()), "--latency-target", "0", RAY_NUM_CPUS="2")
    yield running
    running.stop()


def drawn(url: str, number: int, **more: Any) -> dict[str, Any]:
    name = ("cheap-2", "dear-4")[number % 2]
    body = {"prompt": f"{number} dogs", "candidate": name, "seed": number, **more}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["data"][0]
    return found


def replicas() -> dict[str, int]:
    """Process ids of executor replicas by their deployment's name."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "ServeReplica" in title and "executor-" in title:
                found[title.split("executor-")[1].split("\0")[0].strip()] = int(folder.name)
    return found


def test_pictures_are_the_local_servers_bit_for_bit(on_ray: Server, server: Server) -> None:
    for number in range(4):
        assert drawn(on_ray.url, number)["b64_json"] == drawn(server.url, number)["b64_json"]


def test_routes_progress_and_page_are_there(on_ray: Server) -> None:
    body = {"prompt": "a dog", "candidate": "dear-4", "stream": True, "progress": True, "partial_images": 2}
    with httpx.stream("POST", f"{on_ray.url}/v1/images/generations", json=body, timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    kinds = [json.loads(line)["type"].removeprefix("image_generation.") for line in lines]
    assert kinds[0] == "queued"
    assert {"routed", "progress", "completed"} <= set(kinds)
    assert "script" in httpx.get(on_ray.url).text
    assert "catimage_batch_images_count" in httpx.get(f"{on_ray.url}/metrics").text


def test_urls_are_refused_for_replicas_share_no_files(on_ray: Server) -> None:
    body = {"prompt": "a dog", "response_format": "url"}
    answer = httpx.post(f"{on_ray.url}/v1/images/generations", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_each_set_of_weights_has_replicas_of_its_own(on_ray: Server) -> None:
    assert {name.split("#")[0] for name in replicas()} == {"cheap-2", "middle-3"}


def test_a_killed_replica_costs_no_picture(on_ray: Server) -> None:
    expected = {number: drawn(on_ray.url, number)["b64_json"] for number in range(6)}
    found: dict[int, str] = {}

    def client(number: int) -> None:
        found[number] = drawn(on_ray.url, number, n=4)["b64_json"]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    victims = list(replicas().values())
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert found == expected


def test_told_to_end_it_finishes_what_it_accepted_and_exits_0(on_ray: Server) -> None:
    answers: list[int] = []

    def client() -> None:
        body = {"prompt": "a dog", "candidate": "dear-4", "n": 10}
        answers.append(httpx.post(f"{on_ray.url}/v1/images/generations", json=body, timeout=120).status_code)

    before = on_ray.metric('catimage_images_total{candidate="dear-4",outcome="drawn"}')
    thread = threading.Thread(target=client)
    thread.start()
    while on_ray.metric('catimage_images_total{candidate="dear-4",outcome="drawn"}') == before:
        time.sleep(0.002)
    assert on_ray.stop() == 0
    thread.join()
    assert answers == [200]
    assert not replicas()
