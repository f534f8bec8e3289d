"""``catimage engine list``, ``verify`` and ``prune``: the engine cache as a whole."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catimage_accel.cli.console import say
from catimage_accel.cli.engine.tables import duration, engines, print_table, size

if TYPE_CHECKING:
    from catimage_accel.engines.cache import CacheEntry, EngineCache

_PROFILE = re.compile(r"rows=([\d+]+),height=(\d+),width=(\d+),tokens=(\d+)")


def list_entries(
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON an engine instead.")] = False,
) -> None:
    """List the built engines, last used first."""
    cache = open_cache()
    now = datetime.now(UTC)
    entries = cache.entries()
    if as_json:
        for entry in entries:
            print(json.dumps(described(entry, now)))
        return
    numbers = ("size", "built in", "last used", "age")
    print_table(
        f"{cache.folder}: {engines(len(entries))}, {size(sum(entry.bytes for entry in entries))} of "
        f"{size(cache.max_bytes)}",
        ("digest", "component", "precision", "runtime", "profile", *numbers),
        (
            (
                entry.key.digest[:12], entry.key.component, entry.key.precision,
                f"{entry.key.runtime} {_short(entry.key.runtime_version)}", _shapes(entry.key.profile),
                size(entry.bytes), f"{entry.build_seconds:.1f} s", f"{duration(now - entry.last_used)} ago",
                duration(now - entry.created),
            )
            for entry in entries
        ),
        numbers,
    )  # fmt: skip


def verify() -> None:
    """Hash every file of every built engine; exit code 1 and a line on each that is not what was built."""
    cache = open_cache()
    problems = cache.verify()
    for problem in problems:
        print(" ".join(problem.split()))
    if problems:
        say(f"{engines(len(problems))} damaged in {cache.folder}; each is built again when it is next used")
        raise typer.Exit(1)
    say(f"{engines(len(cache.entries()))} in {cache.folder}, nothing damaged")


def prune(
    max_gb: Annotated[float | None, typer.Option(help="GB to keep; $CATIMAGE_ENGINE_CACHE_GB if absent.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Keep nothing.")] = False,
) -> None:
    """Throw away the least recently used engines, and what killed builds left."""
    if everything and max_gb is not None:
        raise ValueError("--all and --max-gb are given; accepted: one of them")
    if max_gb is not None and not 0 <= max_gb < float("inf"):
        raise ValueError(f"--max-gb is {max_gb}; accepted: gigabytes, a number from 0")
    cache = open_cache()
    before = cache.disk_bytes()
    removed = cache.prune(0 if everything else None if max_gb is None else int(max_gb * 10**9))
    for entry in removed:
        key = entry.key
        print(f"{key.digest[:12]} {key.component} {key.precision} {key.runtime} {key.profile}: {entry.bytes} bytes")
    after = cache.disk_bytes()
    say(f"removed {engines(len(removed))} from {cache.folder}: {before - after} bytes freed, {after} left")


def open_cache() -> EngineCache:
    """The engine cache that the environment names."""
    from catimage_accel.engines.cache import EngineCache

    return EngineCache()


def described(entry: CacheEntry, now: datetime) -> dict[str, Any]:
    """An entry as plain values: its key's fields, bytes, seconds, and times in ISO 8601."""
    key = entry.key
    return {
        "digest": key.digest, "component": key.component, "precision": key.precision, "runtime": key.runtime,
        "runtime_version": key.runtime_version, "profile": key.profile, "device": key.device, "os": key.os,
        "options": dict(key.options), "quantization": key.quantization, "model_sha256": key.model_sha256,
        "bytes": entry.bytes, "build_seconds": entry.build_seconds, "created": entry.created.isoformat(),
        "last_used": entry.last_used.isoformat(), "age_seconds": (now - entry.created).total_seconds(),
    }  # fmt: skip


def _short(version: str) -> str:
    """Without the build's number and branch, which --json and inspect tell."""
    return version.split("-")[0].split(",")[0]


def _shapes(profile: str) -> str:
    """ "rows=8,height=16,width=16,tokens=24" as "8 rows of 16x16, 24 tokens"; any other profile as it is."""
    match = _PROFILE.fullmatch(profile)
    return "{} rows of {}x{}, {} tokens".format(*match.groups()) if match else profile
