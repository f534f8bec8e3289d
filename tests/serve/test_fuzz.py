"""Requests made up from the API's own description, right and wrong ones: none may find a mistake of the server's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from serving import Server

OPERATIONS = (
    ("/v1/images/generations", "POST"), ("/v1/routes", "POST"), ("/v1/models", "GET"),
    ("/v1/images/files/{name}", "GET"), ("/healthz", "GET"), ("/readyz", "GET"), ("/metrics", "GET"),
)  # fmt: skip
# Of those that take parameters, which could be wrong.
EXAMPLES = {"/v1/images/generations": 80, "/v1/routes": 80, "/v1/images/files/{name}": 40}
ANSWERS = (200, 400, 404, 405, 408, 413, 429)


@pytest.fixture(scope="session")
def description(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return found


def test_every_operation_is_fuzzed(description: dict[str, Any]) -> None:
    assert {(path, method.upper()) for path, methods in description["paths"].items() for method in methods} == set(
        OPERATIONS
    )


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(path, method, mode) for path, method in OPERATIONS for mode in GenerationMode
     if mode is GenerationMode.POSITIVE or path in EXAMPLES],
    ids=lambda value: getattr(value, "value", value),
)  # fmt: skip
def test_no_request_finds_a_server_error(
    server: Server, description: dict[str, Any], path: str, method: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(description)[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES.get(path, 3), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def requests(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("n"), int):
            case.body["n"] = min(case.body["n"], 2)  # it is the answers that are tested, not the drawing
        check(case.call(base_url=server.url, timeout=60), path)

    requests()
    assert server.process.poll() is None


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_finds_a_server_error(server: Server, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    check(httpx.post(f"{server.url}/v1/images/generations", content=content, headers=headers, timeout=60), "/v1")


def check(answer: Any, path: str) -> None:
    assert answer.status_code in ANSWERS, answer.text
    if answer.status_code >= 400 and path.startswith("/v1"):
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
