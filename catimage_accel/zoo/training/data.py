"""Training pictures: rendered once, in parallel, kept in one file and in memory."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import track

from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.render import render
from catimage_accel.zoo.scenes import IMAGE_SIZE, Scene, SceneSpec, Split, draw_spec, lay_out

CHUNK = 500
FIRST_MEASURED = 10_000  # test captions below this index are for profiling and for fitting routers
VALIDATION_CAPTIONS = 60_000  # from here on: what runs are watched on while they train
HEADLINE_CAPTIONS = 70_000  # from here on: what students and their teacher are compared on
SPLIT_SEED: dict[Split, int] = {"train": 1, "test": 2}


def scene(index: int, split: Split) -> Scene:
    """Scene ``index`` of a split: the same one on every machine."""
    rng = np.random.default_rng((SPLIT_SEED[split], index))
    return lay_out(draw_spec(rng, split), rng)


def spec(index: int, split: Split) -> SceneSpec:
    """The meaning of scene ``index``, without its layout."""
    return draw_spec(np.random.default_rng((SPLIT_SEED[split], index)), split)


def hard_scenes_weight(spec: SceneSpec, relation: float, count: float) -> float:
    """How often to take a scene, against others: ``relation`` where it has one, ``count`` where a noun is there twice.

    Nouns are learned soon, places and numbers last.
    """
    if spec.relation is not None:
        return relation
    return count if any(number > 1 for _, number in spec.groups) else 1.0


def held_out_captions(number: int, start: int = 0) -> list[tuple[SceneSpec, str]]:
    """Test meanings ``start`` to ``start + number`` with one wording each."""
    indices = range(start, start + number)
    meanings = [spec(index, "test") for index in indices]
    return [
        (said, caption(said, np.random.default_rng((3, index)))) for index, said in zip(indices, meanings, strict=True)
    ]


def training_captions(number: int) -> list[str]:
    """One wording each of the first training scenes."""
    return [caption(spec(index, "train"), np.random.default_rng((5, index))) for index in range(number)]


def _render_chunk(arguments: tuple[int, int, Split]) -> np.ndarray:
    start, stop, split = arguments
    return np.stack([render(scene(index, split)) for index in range(start, stop)])


def rendered(number: int, split: Split, cache: Path | None = None) -> np.ndarray:
    """The first ``number`` scenes' pictures: uint8 (number, 64, 64, 3). Kept in ``cache`` where given."""
    path = cache / f"scenes-{split}-{number}.npy" if cache else None
    if path and path.exists():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    chunks = [(s, min(s + CHUNK, number), split) for s in range(0, number, CHUNK)]
    pictures = np.empty((number, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    with ProcessPoolExecutor() as pool:
        results = track(pool.map(_render_chunk, chunks), f"rendering {number} {split} scenes", total=len(chunks))
        for (start, stop, _), chunk in zip(chunks, results, strict=True):
            pictures[start:stop] = chunk
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pictures)
        os.replace(partial, path)
    return pictures
