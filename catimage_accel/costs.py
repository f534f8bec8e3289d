"""What was measured of candidates' costs: which engine is the fastest on a device, and what an image then takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

EngineTimes = dict[str, dict[str, dict[str, Annotated[float, Field(gt=0)]]]]
Milliseconds = dict[str, EngineTimes]
"""[device][engine][candidate][batch size] -> milliseconds an image."""

CostUnit = Literal["gflop", "milliseconds"]
COST_NAMES: Mapping[CostUnit, str] = {"gflop": "GFLOP", "milliseconds": "ms"}

# Compiles anew in every process, for half a minute and more: never chosen unasked.
BY_REQUEST = ("compiled",)
_THREADS = " threads"


def ranked_engines(milliseconds: Milliseconds, device: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The engines measured on ``device`` for ``candidates``, which share their weights, fastest first.

    By the geometric mean over all pairs of candidate and batch size that every one of these engines has. A processor
    where none of the candidates was measured goes by another where they were, one with the same vectors if there is
    any. Those of ``BY_REQUEST`` are left out. Empty where nothing was measured.
    """
    for measured in (milliseconds.get(device, {}), *_like(milliseconds, device)):
        if ranked := _ranked(_automatic(measured), candidates):
            return ranked
    return ()


def _ranked(engines: EngineTimes, candidates: Sequence[str]) -> tuple[str, ...]:
    times = {
        engine: {
            (name, batch): value for name in candidates for batch, value in found.get(name, {}).items()
        }
        for engine, found in engines.items()
    }  # fmt: skip
    times = {engine: pairs for engine, pairs in times.items() if pairs}
    if not times:
        return ()
    common = set.intersection(*(set(pairs) for pairs in times.values()))
    most = common or {pair for pairs in times.values() for pair in pairs}

    def mean(engine: str) -> float:
        known = [math.log(times[engine][pair]) for pair in most if pair in times[engine]]
        return sum(known) / len(known)

    return tuple(sorted(times, key=mean))


def fastest(
    milliseconds: Milliseconds, device: str, candidate: str, engine: str = "auto"
) -> dict[str, tuple[str, float]]:
    """Batch size -> (engine, milliseconds an image) of ``engine``, or of the fastest chosen unasked, on ``device``."""
    engines = milliseconds.get(device, {})
    engines = _automatic(engines) if engine == "auto" else {engine: engines.get(engine, {})}
    found: dict[str, tuple[str, float]] = {}
    for engine, times in engines.items():
        for batch, value in times.get(candidate, {}).items():
            if batch not in found or value < found[batch][1]:
                found[batch] = engine, value
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _automatic(engines: EngineTimes) -> EngineTimes:
    return {name: times for name, times in engines.items() if name not in BY_REQUEST}


def _like(milliseconds: Milliseconds, device: str) -> list[EngineTimes]:
    """What other processors have, if ``device`` is one: engines keep their order better than their times.

    Those of the same name and vectors ("AMD EPYC (AVX2), 8 threads") come first, then those of the same vectors.
    """
    if not device.endswith(_THREADS):
        return []
    others = [name for name in milliseconds if name.endswith(_THREADS) and name != device]

    def unlike(name: str) -> tuple[bool, bool]:
        here, there = (one.rpartition(", ")[0] for one in (device, name))
        return here != there, here.rpartition(" (")[2] != there.rpartition(" (")[2]

    return [milliseconds[name] for name in sorted(others, key=unlike)]
