"""Scenes: what a caption says, and one of the many pictures that it leaves open.

A ``SceneSpec`` is the caption's meaning: which objects, how many, their spatial relation, the
background colour. A ``Scene`` adds what the caption does not say: every object's position, size,
rotation and mirroring, the background's exact shade and texture. ``draw_spec`` and ``lay_out`` take a
``numpy.random.Generator`` and nothing else, so a seed names a scene.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from catimage_accel.zoo.objects import NOUNS

IMAGE_SIZE = 64
MAX_OBJECTS = 4

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (243, 243, 240),
    "gray": (150, 152, 156),
    "pink": (246, 170, 196),
    "yellow": (248, 222, 120),
    "orange": (244, 158, 84),
    "green": (140, 204, 130),
    "blue": (124, 176, 236),
    "purple": (172, 138, 214),
}

Texture = Literal["plain", "gradient", "dots", "stripes", "checks"]
TEXTURES: tuple[Texture, ...] = ("plain", "gradient", "dots", "stripes", "checks")

Relation = Literal["left", "right", "above", "below", "between"]
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}

Split = Literal["train", "test"]
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class SceneSpec:
    """A caption's meaning.

    ``groups`` holds (noun, count) pairs, counts summing to 1 to 4. ``relation`` places the first object
    relative to the second ("left": it is left of it), or, for "between", the first between the other two.
    """

    groups: tuple[tuple[str, int], ...]
    background: str
    relation: Relation | None = None

    @property
    def num_objects(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def split(self) -> Split:
        """Which side of the hold-out this meaning falls on; a test meaning is never trained on.

        Decided by a hash of the set of nouns, with counts; a lone noun's background counts too, since
        every noun alone must be known.
        """
        key = " ".join(f"{noun}:{count}" for noun, count in sorted(self.groups))
        if len(self.groups) == 1:
            key += f" on {self.background}"
        digest = hashlib.sha256(key.encode()).digest()
        return "test" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


@dataclass(frozen=True)
class PlacedObject:
    """One object: centre and longer side in pixels, rotation in degrees counter-clockwise."""

    noun: str
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """A spec with everything decided that the picture needs. ``shade`` shifts the colour, in 8-bit levels."""

    spec: SceneSpec
    objects: tuple[PlacedObject, ...]
    texture: Texture
    shade: tuple[int, int, int]
    texture_phase: tuple[float, float]


@dataclass(frozen=True)
class Variety:
    """How much varies of what the caption leaves open. Sizes are the longer side in pixels, by object count."""

    sizes: tuple[tuple[float, float], ...] = ((30, 46), (24, 32), (21, 28), (20, 26))
    max_angle: float = 12.0
    mirror_probability: float = 0.5
    textured_share: float = 0.7
    shade: int = 8


def mirrored_spec(spec: SceneSpec) -> SceneSpec:
    """What ``spec``'s pictures show when they are mirrored left to right."""
    swapped: dict[Relation, Relation] = {"left": "right", "right": "left"}
    if spec.relation not in swapped:
        return spec
    return dataclasses.replace(spec, relation=swapped[spec.relation])


KIND_WEIGHTS = {
    "one": 0.16,
    "same": 0.18,
    "two": 0.12,
    "three": 0.14,
    "four": 0.12,
    "counted": 0.10,
    "pair": 0.13,
    "between": 0.05,
}
DIRECTIONS: tuple[Relation, ...] = ("left", "right", "above", "below")


def draw_spec(rng: np.random.Generator, split: Split = "train") -> SceneSpec:
    """A random meaning from the given side of the hold-out."""
    while True:
        spec = _any_spec(rng)
        if spec.split == split:
            return spec


def _any_spec(rng: np.random.Generator) -> SceneSpec:
    kind = rng.choice(list(KIND_WEIGHTS), p=list(KIND_WEIGHTS.values()))
    background = str(rng.choice(list(BACKGROUNDS)))
    nouns = [NOUNS[i] for i in rng.choice(len(NOUNS), MAX_OBJECTS, replace=False)]
    relation: Relation | None = None
    if kind == "same":
        counts = [int(rng.integers(2, MAX_OBJECTS + 1))]
    elif kind == "counted":
        counts = [2, 1] if rng.random() < 0.5 else ([3, 1] if rng.random() < 0.5 else [2, 2])
    elif kind == "pair":
        counts, relation = [1, 1], DIRECTIONS[rng.integers(len(DIRECTIONS))]
    elif kind == "between":
        counts, relation = [1, 1, 1], "between"
    else:
        counts = [1] * {"one": 1, "two": 2, "three": 3, "four": 4}[str(kind)]
    return SceneSpec(tuple(zip(nouns, counts, strict=False)), background, relation)


def lay_out(spec: SceneSpec, rng: np.random.Generator, variety: Variety | None = None) -> Scene:
    """Decide everything that ``spec`` leaves open."""
    variety = variety or Variety()
    nouns = [noun for noun, count in spec.groups for _ in range(count)]
    low, high = variety.sizes[len(nouns) - 1]
    sizes = rng.uniform(low, high, len(nouns))
    centres = _place(sizes, spec.relation, rng)
    angles = rng.uniform(-variety.max_angle, variety.max_angle, len(nouns))
    mirrored = rng.random(len(nouns)) < variety.mirror_probability
    texture: Texture = "plain"
    if rng.random() < variety.textured_share:
        texture = TEXTURES[rng.integers(1, len(TEXTURES))]
    shade = tuple(int(v) for v in rng.integers(-variety.shade, variety.shade + 1, 3))
    phase = (float(rng.random()), float(rng.random()))
    objects = tuple(
        PlacedObject(noun, float(x), float(y), float(size), float(angle), bool(flip))
        for noun, (x, y), size, angle, flip in zip(nouns, centres, sizes, angles, mirrored, strict=True)
    )
    return Scene(spec, objects, texture, shade, phase)  # type: ignore[arg-type]


def _place(sizes: np.ndarray, relation: Relation | None, rng: np.random.Generator) -> np.ndarray:
    """Centres for boxes of the given sizes: inside the picture, hardly overlapping, the relation held.

    Rejection sampling; when the boxes prove too large for it they shrink, in place, a little at a time.
    """
    reach = (sizes[:, None] + sizes[None, :]) / 2 * 0.88
    np.fill_diagonal(reach, 0)
    while True:
        for _ in range(60):
            margin = sizes / 2 * 0.92
            centres = margin[:, None] + rng.random((len(sizes), 2)) * (IMAGE_SIZE - 2 * margin)[:, None]
            distance = np.hypot(*(centres[:, None] - centres[None, :]).transpose(2, 0, 1))
            if np.all(distance >= reach) and relation_holds(centres, sizes, relation):
                return centres
        sizes *= 0.96
        reach *= 0.96


def relation_holds(centres: np.ndarray, sizes: np.ndarray, relation: Relation | None) -> bool:
    """Whether the objects at ``centres`` (n, 2) plainly stand in ``relation``; y grows downwards."""
    if relation is None:
        return True
    if relation == "between":
        a, b, c = centres
        span = c - b
        along = float(np.dot(a - b, span) / np.dot(span, span))
        across = abs(float(span[0] * (a - b)[1] - span[1] * (a - b)[0])) / float(np.hypot(*span))
        return 0.3 <= along <= 0.7 and across <= 0.35 * float(sizes.mean())
    dx, dy = centres[0] - centres[1]
    forward, sideways = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return bool(forward >= 0.8 * sizes[:2].mean() and abs(sideways) <= 0.5 * forward)
