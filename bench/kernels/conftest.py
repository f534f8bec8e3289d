"""The device that is measured, as a fixture."""

from __future__ import annotations

import pytest
from harness import Bench


@pytest.fixture(scope="session")
def bench() -> Bench:
    """Measures the device's ceilings once."""
    return Bench()
