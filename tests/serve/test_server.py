"""`catimage serve` as its clients meet it: a real process on loopback, the official openai client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import COMMAND, Server, start_server

import catimage_accel as ca

DEAR = {"prompt": "a dog, a cat and three crowns", "tradeoff": 0, "seed": 3}


@pytest.fixture(scope="module")
def http(server: Server) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def generate(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/images/generations", json=body)


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    with http.stream("POST", "/v1/images/generations", json={"stream": True, **body}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


class TestOpenAIClient:
    def test_draws_what_the_pipeline_draws_bit_for_bit(self, client: openai.OpenAI, tiny_catalog: Path) -> None:
        answer = client.images.generate(prompt=DEAR["prompt"], n=2, extra_body={"tradeoff": 0, "seed": 3})  # type: ignore[arg-type]
        assert answer.data is not None
        assert answer.size == "64x64"
        pipe = ca.RoutedPipeline.from_pretrained(tiny_catalog, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        for seed, image in enumerate(answer.data, start=3):
            import torch

            generator = torch.Generator().manual_seed(seed)
            expected = pipe(DEAR["prompt"], tradeoff=0, generator=generator)  # type: ignore[arg-type]
            assert image.model_extra is not None
            assert image.model_extra["seed"] == seed
            assert image.model_extra["route"]["candidate"] == expected.routes[0].candidate
            assert np.array_equal(pixels(image.b64_json or ""), np.asarray(expected.images[0]))

    def test_gets_urls(self, client: openai.OpenAI) -> None:
        answer = client.images.generate(prompt="a dog", response_format="url", output_format="webp")
        assert answer.data is not None
        url = answer.data[0].url
        assert url is not None
        picture = httpx.get(url)
        assert picture.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(picture.content)).size == (64, 64)

    def test_streams(self, client: openai.OpenAI) -> None:
        stream = client.images.generate(
            prompt="a dog", stream=True, partial_images=2, extra_body={"candidate": "dear-4", "seed": 1}
        )
        seen = list(stream)
        assert seen[-1].type == "image_generation.completed"
        assert {event.type for event in seen[:-1]} <= {"image_generation.partial_image"}
        whole = client.images.generate(prompt="a dog", model="dear-4", extra_body={"seed": 1})
        assert whole.data is not None
        assert whole.data[0].b64_json == seen[-1].b64_json

    def test_lists_models(self, client: openai.OpenAI) -> None:
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "cheap-2", "middle-3", "dear-4"]

    @pytest.mark.parametrize(
        ("more", "error", "param"),
        [
            ({"model": "gpt-image-2"}, openai.NotFoundError, "model"),
            ({"n": 11}, openai.BadRequestError, "n"),
            ({"size": "1024x1024"}, openai.BadRequestError, "size"),
            ({"extra_body": {"candidate": "nobody"}}, openai.BadRequestError, "candidate"),
            ({"extra_body": {"tradeof": 1}}, openai.BadRequestError, "tradeof"),
        ],
        ids=["unknown-model", "too-many-images", "too-large", "unknown-candidate", "misspelt"],
    )
    def test_raises_its_own_errors(
        self, client: openai.OpenAI, more: dict[str, Any], error: type[openai.APIStatusError], param: str
    ) -> None:
        with pytest.raises(error) as caught:
            client.images.generate(prompt="a dog", **more)
        assert caught.value.body["param"] == param  # type: ignore[index]
        assert param in str(caught.value)

    def test_a_missed_deadline_is_not_tried_again(self, server: Server) -> None:
        patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        began = time.monotonic()
        with pytest.raises(openai.APIStatusError) as caught:
            patient.images.generate(prompt="a dog", extra_body={"deadline_ms": 1, "candidate": "dear-4"})
        assert caught.value.status_code == 408
        assert time.monotonic() - began < 3


class TestAnswers:
    def test_stream_tells_queue_route_and_every_step(self, http: httpx.Client) -> None:
        seen = events(http, prompt="a dog", candidate="dear-4", progress=True, partial_images=3, n=2)
        kinds = [event["type"].removeprefix("image_generation.") for event in seen]
        assert kinds.count("completed") == kinds.count("routed") == 2
        assert {(event["step"], event["steps"]) for event in seen if "step" in event} <= {(n, 4) for n in range(1, 5)}
        last = [event for event in seen if event["type"].endswith("completed")]
        assert {event["image_index"] for event in last} == {0, 1}
        assert last[0]["route"]["reason"] == "candidate"

    @pytest.mark.parametrize(
        "policy", [{"tradeoff": 0.0}, {"budget": 3.0}, {"min_quality": 0.0}, {"candidate": "middle-3"}, {}], ids=str
    )
    def test_routes_are_told_without_drawing(self, http: httpx.Client, policy: dict[str, Any]) -> None:
        told = http.post("/v1/routes", json={"prompt": DEAR["prompt"], **policy}).json()
        drawn = generate(http, prompt=DEAR["prompt"], **policy).json()["data"][0]["route"]
        for key in ("candidate", "predicted_quality", "cost", "reason", "tradeoff"):
            assert told[key] == drawn[key]

    def test_sizes_within_limits(self, http: httpx.Client) -> None:
        answer = generate(http, prompt="a dog", size="96x64").json()
        assert answer["size"] == "96x64"
        assert pixels(answer["data"][0]["b64_json"]).shape == (64, 96, 3)

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [
            ({}, 400, "prompt"),
            ({"prompt": ""}, 400, "prompt"),
            ({"prompt": "x" * 4001}, 400, "prompt"),
            ({"prompt": "a dog", "tradeoff": 0.1, "budget": 5}, 400, None),
            ({"prompt": "a dog", "budget": 0.5}, 400, None),
            ({"prompt": "a dog", "tradeoff": -1}, 400, "tradeoff"),
            ({"prompt": "a dog", "seed": 2**32}, 400, "seed"),
            ({"prompt": "a dog", "model": "cheap-2", "tradeoff": 1}, 400, "tradeoff"),
            ({"prompt": "a dog", "size": "64x-64"}, 400, "size"),
        ],
        ids=["nothing", "empty", "too-long", "two-policies", "under-the-cheapest", "negative", "33-bits",
             "model-and-tradeoff", "no-size"],
    )  # fmt: skip
    def test_wrong_requests(self, http: httpx.Client, body: dict[str, Any], status: int, param: str | None) -> None:
        for path in (
            ("/v1/images/generations", "/v1/routes")
            if not {"seed", "size"} & set(body)
            else ("/v1/images/generations",)
        ):
            answer = http.post(path, json=body)
            assert answer.status_code == status
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param

    @pytest.mark.parametrize(
        "content", [b"{", b"[]", b"\xff", b'"text"', b'{"prompt": "\\ud800"}', b'{"prompt": 1e999}']
    )
    def test_bodies_that_are_no_request(self, http: httpx.Client, content: bytes) -> None:
        answer = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]

    def test_a_prompt_of_any_unicode(self, http: httpx.Client) -> None:
        assert generate(http, prompt="a \x00 dog \U0001f436 ‮ \u0301", candidate="cheap-2").status_code == 200

    @pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
    def test_large_bodies_are_refused(self, http: httpx.Client, declared: bool) -> None:
        body = json.dumps({"prompt": "x" * 200_000}).encode()
        content: Any = body if declared else iter([body[:100_000], body[100_000:]])
        answer = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"

    def test_large_headers_are_refused(self, server: Server) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            with contextlib.suppress(ConnectionError):  # refused before it was all sent
                for number in range(100):
                    client.sendall(b"X-%d: %s\r\n" % (number, b"a" * 10_000))
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1000).startswith(b"HTTP/1.1 400 ")

    def test_a_missed_deadline_keeps_the_connection_and_the_log(self, server: Server) -> None:
        lines = len(server.lines)
        connection = HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        late = json.dumps({"prompt": "a dog", "candidate": "dear-4", "deadline_ms": 1})
        for body, status in ((late, 408), (late, 408), (json.dumps({"prompt": "a dog"}), 200)):
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
            assert answer.getheader("connection") != "close"
            assert connection.sock is not None
            connection.auto_open = 0  # the next one is on this connection, or fails
        connection.close()
        assert server.lines[lines:] == []

    def test_unknown_pictures_and_paths(self, http: httpx.Client) -> None:
        for path in (
            "/v1/images/files/x.png",
            "/v1/images/files/..%2f..%2fetc%2fpasswd",
            "/nowhere",
            "/page/../api.py",
        ):
            answer = http.get(path)
            assert answer.status_code == 404
            assert "error" in answer.json()

    def test_headers_on_every_answer(self, http: httpx.Client) -> None:
        for path in ("/", "/v1/models", "/nowhere", "/metrics", "/page/docs.js"):
            headers = http.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]

    def test_operations(self, http: httpx.Client) -> None:
        assert http.get("/healthz").text == "ok\n"
        assert http.get("/readyz").status_code == 200
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/v1/images/generations", "/v1/routes", "/v1/models", "/metrics"} <= set(paths)
        text = http.get("/metrics").text
        for name in ("queue_depth", "batch_images_bucket", "images_per_second", "denoise_steps_per_second",
                     "route_share", "cost_total", "latency_quantile_seconds"):  # fmt: skip
            assert f"catimage_{name}" in text


class TestClientsThatLeave:
    def wait_until_idle(self, server: Server) -> None:
        deadline = time.monotonic() + 20
        while server.metric("catimage_in_flight") or server.metric("catimage_queue_depth"):
            assert time.monotonic() < deadline, "the slot was not freed"
            time.sleep(0.05)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_their_slots_are_freed(self, server: Server, stream: bool) -> None:
        before = server.metric('catimage_images_total{candidate="dear-4",outcome="cancelled"}')

        async def main() -> None:
            async with httpx.AsyncClient(base_url=server.url) as http:
                body = {"prompt": "a dog", "candidate": "dear-4", "n": 10, "stream": stream}
                calls = [asyncio.create_task(http.post("/v1/images/generations", json=body)) for _ in range(4)]
                while not server.metric("catimage_queue_depth"):
                    await asyncio.sleep(0.01)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)

        asyncio.run(main())
        self.wait_until_idle(server)
        assert server.metric('catimage_images_total{candidate="dear-4",outcome="cancelled"}') > before

    def test_one_that_does_not_read_holds_nobody_up(self, server: Server, http: httpx.Client) -> None:
        body = json.dumps({"prompt": "a dog", "n": 10, "stream": True, "progress": True, "partial_images": 16})
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.sendall(
                f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert generate(http, prompt="a cat", candidate="cheap-2").status_code == 200
            self.wait_until_idle(server)


def test_a_full_queue_answers_429_with_retry_after(tiny_catalog: Path) -> None:
    server = start_server(tiny_catalog, "--max-batch", "1", "--max-queue", "2", "--latency-target", "0")
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: generate(http, prompt="a dog", candidate="dear-4"), range(12)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
        assert sum(answer.status_code == 200 for answer in answers) == 12 - len(refused) >= 3
    finally:
        server.stop()


def test_a_token_is_asked_for(tiny_catalog: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    server = start_server(tiny_catalog, "--token-file", str(file))
    try:
        url = f"{server.url}/v1/images/generations"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = httpx.post(url, json={"prompt": "a dog"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret")
        answer = client.images.generate(prompt="a dog", response_format="url")
        assert answer.data is not None
        assert httpx.get(answer.data[0].url or "").status_code == 200
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert "s3cret" not in "\n".join(server.lines)
    finally:
        server.stop()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_end_it_finishes_what_it_accepted_and_exits_0(tiny_catalog: Path, how: int) -> None:
    server = start_server(tiny_catalog, "--max-batch", "2", "--latency-target", "0")
    workers = server.worker_pids()
    with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(generate, http, prompt="a dog", candidate="dear-4", n=10) for _ in range(3)]
        drawn = 'catimage_images_total{candidate="dear-4",outcome="drawn"}'
        while sum(map(server.metric, ("catimage_queue_depth", "catimage_in_flight", drawn))) < 30:
            time.sleep(0.01)
        os.kill(server.process.pid, how)
        assert [call.result().status_code for call in calls] == [200] * 3
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            generate(http, prompt="a dog")
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_told_to_end_before_a_worker_is_there_it_exits_0(tiny_catalog: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--catalog", str(tiny_catalog), "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "http://" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines)


def test_a_taken_port_is_told_in_one_line(server: Server, tiny_catalog: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError, match=f"can't listen on 127.0.0.1:{port}"):
        start_server(tiny_catalog, "--port", port)


def test_a_catalog_with_a_changed_file_is_not_served(tiny_catalog: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(tiny_catalog, folder)
    weights = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AssertionError, match="diffusion_pytorch_model"):
        start_server(folder)


def test_threads_of_one_process_may_call_at_once(http: httpx.Client) -> None:
    alone = [generate(http, prompt="a dog", seed=seed, candidate="dear-4").json() for seed in range(6)]
    found: dict[int, Any] = {}

    def draw(seed: int) -> None:
        found[seed] = generate(http, prompt="a dog", seed=seed, candidate="dear-4").json()

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        assert found[seed]["data"][0]["b64_json"] == alone[seed]["data"][0]["b64_json"]
