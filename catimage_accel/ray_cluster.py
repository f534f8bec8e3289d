"""A connection to Ray: a cluster that is there, or one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["connect"]


@contextmanager
def connect(address: str | None = None, **options: Any) -> Iterator[None]:
    """Ray, connected for the block.

    ``address`` as ``ray.init`` has it, or in RAY_ADDRESS; None: the cluster that `ray start --head` began on this
    machine, or a new one that ends with the block, made with ``options`` of ``ray.init``. A connection that was there
    before is used and left. ImportError says how to install Ray; ConnectionError that there is none at ``address``.
    """
    # Nothing is reported to anyone unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is missing: `pip install catimage-accel[ray]`") from error
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        _check_answers(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError:
        if address is not None:
            raise
        ray.init(include_dashboard=False, **{**quiet, **options})
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or leave the address out"
        ) from None
