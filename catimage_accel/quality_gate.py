"""A candidate in low precision held against its twin in full precision: same prompts, same seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field

from catimage_accel.candidate import QUANTIZED_PRECISIONS, Candidate
from catimage_accel.executor import Executor
from catimage_accel.scoring import draw, image_seed
from catimage_accel.storage import Strict, read_json, validated, write_atomic

if TYPE_CHECKING:
    from catimage_accel.quality import CLIPScore

GATE_FILE = "gate.json"
MAX_CHANGE, MAX_DISTANCE = 0.01, 0.05
RESAMPLES = 2000
Advance = Callable[[int], None]


class Gated(Strict):
    """One candidate beside its ``twin``, over ``images`` pairs of pictures with the same prompt and seed.

    ``change`` is the relative change of the mean CLIPScore, (candidate - twin) / twin, with the 95% bootstrap interval
    over prompts ``change_low`` to ``change_high``. ``distance`` is 1 - cosine of the judge's embeddings of the two
    pictures, on average; ``seed_distance`` the same between two pictures of the twin with different seeds.
    """

    candidate: str
    twin: str
    images: Annotated[int, Field(ge=1)]
    clip_score: float
    twin_clip_score: float
    change: float
    change_low: float
    change_high: float
    distance: float
    seed_distance: float
    max_change: float = MAX_CHANGE
    max_distance: float = MAX_DISTANCE

    @property
    def passed(self) -> bool:
        """Whether it loses no more than ``max_change`` of the CLIPScore and lies no further than ``max_distance``."""
        return self.change >= -self.max_change and self.distance <= self.max_distance


class _GateFields(Strict):
    gated: list[Gated]


def twin_of(candidate: Candidate, candidates: Sequence[Candidate], device: torch.device) -> Candidate:
    """``candidate`` in full precision: float32 on a processor, float16 on CUDA; the one of ``candidates``, if any."""
    precision = "fp16" if device.type == "cuda" else "fp32"
    made = replace(
        candidate, name=f"{candidate.name}-{precision}", precision=precision, quantization=None, engine="auto"
    )
    for one in candidates:
        if replace(one, name=made.name, engine=made.engine) == made and one.options == made.options:
            return one
    return made


def gate(
    candidate: Candidate,
    twin: Candidate,
    executor: Executor,
    judge: CLIPScore,
    prompts: Sequence[str],
    *,
    max_change: float = MAX_CHANGE,
    max_distance: float = MAX_DISTANCE,
    advance: Advance = lambda _: None,
) -> Gated:
    """Draws ``prompts`` with both and compares; ValueError for a candidate that has no lower precision than its twin.

    ``seed_distance`` is taken over the first fifth of the prompts, at least one.
    """
    if candidate.precision not in QUANTIZED_PRECISIONS:
        raise ValueError(
            f"candidate {candidate.name!r} has precision {candidate.precision}; accepted: "
            f"{' or '.join(QUANTIZED_PRECISIONS)}"
        )
    if not prompts:
        raise ValueError("no prompt to compare by; accepted: at least 1, 500 for a figure worth telling")
    own = judge.embed_images(_pictures(executor, candidate, prompts, 0, advance))
    others = judge.embed_images(_pictures(executor, twin, prompts, 0, advance))
    few = list(prompts[: max(1, len(prompts) // 5)])
    again = judge.embed_images(_pictures(executor, twin, few, 1, advance))
    texts = judge.embed_texts(list(prompts))
    scores, twin_scores = (np.clip((images * texts).sum(axis=1), 0, 1) for images in (own, others))
    picks = np.random.default_rng(0).integers(len(prompts), size=(RESAMPLES, len(prompts)))
    means, twin_means = scores[picks].mean(axis=1), twin_scores[picks].mean(axis=1)
    low, high = np.quantile(means / twin_means - 1, [0.025, 0.975])
    return Gated(
        candidate=candidate.name, twin=twin.name, images=len(prompts),
        clip_score=float(scores.mean()), twin_clip_score=float(twin_scores.mean()),
        change=float(scores.mean() / twin_scores.mean() - 1), change_low=float(low), change_high=float(high),
        distance=float((1 - (own * others).sum(axis=1)).mean()),
        seed_distance=float((1 - (again * others[: len(few)]).sum(axis=1)).mean()),
        max_change=max_change, max_distance=max_distance,
    )  # fmt: skip


def read_gate(folder: Path) -> dict[str, Gated]:
    """What a catalog's gate.json holds, by candidate; empty without one. ValueError for one that is wrong."""
    path = folder / GATE_FILE
    if not path.is_file():
        return {}
    return {one.candidate: one for one in validated(_GateFields, read_json(path), str(path)).gated}


def write_gate(folder: Path, gated: Sequence[Gated]) -> None:
    """Puts ``gated`` into a catalog's gate.json, in place of what it had of these candidates."""
    merged = read_gate(folder) | {one.candidate: one for one in gated}
    rounded = [
        {key: round(value, 6) if isinstance(value, float) else value for key, value in one.model_dump().items()}
        for one in merged.values()
    ]
    write_atomic(folder / GATE_FILE, (json.dumps({"gated": rounded}, indent=1) + "\n").encode())


def _pictures(
    executor: Executor, candidate: Candidate, prompts: Sequence[str], seed: int, advance: Advance
) -> list[np.ndarray]:
    drawn, error = draw(executor, [(prompt, candidate, image_seed(seed, prompt)) for prompt in prompts], advance)
    if error is not None:
        raise error
    return [image for _, image in drawn]
