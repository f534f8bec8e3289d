"""Measures every engine on this machine for every candidate and batch size, for ``catimage engine tune``."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from catimage_accel.candidate import Candidate
from catimage_accel.catalog import Catalog
from catimage_accel.costs import Milliseconds
from catimage_accel.engines import EngineUnavailable
from catimage_accel.executor import Executor
from catimage_accel.profiling import BATCH_SIZES, profiled_device, time_candidates

__all__ = ["Tuned", "tune_engines"]


@dataclass(frozen=True)
class Tuned:
    """``milliseconds`` [engine][candidate][batch size] an image; ``skipped`` [engine][candidate]: why not measured."""

    milliseconds: dict[str, dict[str, dict[str, float]]]
    skipped: dict[str, dict[str, str]]


def tune_engines(
    catalog: Catalog,
    engines: Sequence[str],
    device: torch.device,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    rounds: int = 3,
    advance: Callable[[int], None] = lambda _: None,
) -> Tuned:
    """Times ``catalog``'s candidates with each of ``engines``, in turns, the median of ``rounds``.

    Turns are in an order that changes, so that what else the machine does in a while falls on all alike. An engine that
    can't run a candidate here is skipped and told; nothing is measured with another in its place. ``advance`` is told
    how many pairs of engine and candidate are done.
    """
    executor = Executor(
        max_batch=max(batch_sizes), device=device, resolve_model=catalog.resolve_model,
        resolve_lora=catalog.resolve_lora, fall_back=False
    )  # fmt: skip
    tuned = Tuned({}, {})
    able: dict[tuple[object, ...], list[Candidate]] = {}
    for engine in engines:
        for candidate in catalog.candidates:
            with_engine = replace(candidate, engine=engine)
            reason = _why_not(executor, with_engine)
            if reason is None:
                able.setdefault((engine, candidate.weights), []).append(with_engine)
            else:
                tuned.skipped.setdefault(engine, {})[candidate.name] = reason
                advance(1)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    order = random.Random(0)
    for turn in range(rounds):
        for group in order.sample(list(able.values()), len(able)):
            engine, names = group[0].engine, [candidate.name for candidate in group]
            if group[0].name in tuned.skipped.get(engine, {}):
                continue
            timed = time_candidates(replace(catalog, candidates=tuple(group)), executor, batch_sizes)
            if (reason := _gave_up(executor, group[0])) is not None:
                tuned.skipped.setdefault(engine, {}).update(dict.fromkeys(names, reason))
                advance(len(group))
                continue
            for name, times in timed.items():
                for batch, value in times.items():
                    found.setdefault((engine, name), {}).setdefault(batch, []).append(value)
            if turn == rounds - 1:
                advance(len(group))
    for (engine, name), by_batch in found.items():
        if name not in tuned.skipped.get(engine, {}):
            medians = {batch: statistics.median(values) for batch, values in by_batch.items()}
            tuned.milliseconds.setdefault(engine, {})[name] = medians
    return tuned


def tuned_catalog(catalog: Catalog, tuned: Tuned, device: torch.device) -> Catalog:
    """``catalog`` with the times of this device, by which routing now weighs costs; other engines keep theirs."""
    name = profiled_device(device)
    kept = catalog.milliseconds.get(name, {})
    milliseconds: Milliseconds = {**catalog.milliseconds, name: {**kept, **tuned.milliseconds}}
    return replace(catalog, milliseconds=milliseconds, cost="milliseconds", cost_device=name)


def _why_not(executor: Executor, candidate: Candidate) -> str | None:
    """Why ``candidate.engine`` can't run the candidate here; None if it can, and is loaded."""
    try:
        executor.prepare(candidate)
    except (EngineUnavailable, ValueError) as error:
        return str(error)
    return None


def _gave_up(executor: Executor, candidate: Candidate) -> str | None:
    """What PyTorch ran in the place of ``candidate.engine``, if it did."""
    parts = getattr(executor.prepare(candidate)[0], "given_up", ())
    return f"PyTorch ran the {' and '.join(sorted(parts))} in its place" if parts else None
