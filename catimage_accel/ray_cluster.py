"""A connection to Ray: a cluster that is there, or one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import os
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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", **quiet)
    except ConnectionError as error:
        if address or os.environ.get("RAY_ADDRESS"):
            raise ConnectionError(
                f"no Ray cluster answers at {address or os.environ['RAY_ADDRESS']}; start one with "
                "`ray start --head`, or leave the address out"
            ) from error
        ray.init(include_dashboard=False, **{**quiet, **options})
    try:
        yield
    finally:
        ray.shutdown()
