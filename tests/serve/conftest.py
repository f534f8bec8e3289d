"""A real server on loopback, over the tiny catalog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, start_server


@pytest.fixture(scope="session")
def server(tiny_catalog: Path) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    running = start_server(tiny_catalog, "--max-batch", "4", "--latency-target", "0")
    yield running
    running.stop()
