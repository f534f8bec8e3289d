"""Captions of scenes in varied English, and near misses: captions that are almost, but not, true."""

from __future__ import annotations

import dataclasses

import numpy as np

from catimage_accel.zoo.objects import NOUNS, article, plural
from catimage_accel.zoo.scenes import BACKGROUNDS, MAX_OBJECTS, OPPOSITE, Relation, SceneSpec

NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "between": ("between",),
}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ")
BACKGROUND_PHRASES = ("on {} background", "on {} background", "against {} background", "on {}")


def caption(spec: SceneSpec, rng: np.random.Generator) -> str:
    """One of the ways to say ``spec``, lower case, without a full stop."""
    phrases = [_group(noun, count) for noun, count in spec.groups]
    if spec.relation == "between":
        body = f"{phrases[0]} between {phrases[1]} and {phrases[2]}"
    elif spec.relation is not None:
        options = RELATION_PHRASES[spec.relation]
        body = f"{phrases[0]} {options[rng.integers(len(options))]} {phrases[1]}"
    else:
        phrases = [phrases[i] for i in rng.permutation(len(phrases))]
        body = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    template = BACKGROUND_PHRASES[rng.integers(len(BACKGROUND_PHRASES))]
    colour = spec.background if template == "on {}" else f"{article(spec.background)} {spec.background}"
    return f"{opening}{body} {template.format(colour)}"


def _group(noun: str, count: int) -> str:
    return f"{article(noun)} {noun}" if count == 1 else f"{NUMBER_WORDS[count]} {plural(noun)}"


def near_misses(
    spec: SceneSpec,
    number: int,
    rng: np.random.Generator,
    odds: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25),
) -> list[SceneSpec]:
    """``number`` different specs, each with one noun, count, relation or the background changed.

    ``odds`` are those four changes' chances; one that ``spec`` doesn't allow is drawn again.
    """
    changes = (_change_noun, _change_count, _change_relation, _change_background)
    found: dict[SceneSpec, None] = {}
    while len(found) < number:
        change = changes[rng.choice(4, p=odds)]
        changed = change(spec, rng)
        if changed is not None:
            found[changed] = None
    return list(found)


def _change_noun(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec:
    present = {noun for noun, _ in spec.groups}
    others = [noun for noun in NOUNS if noun not in present]
    groups = list(spec.groups)
    index = int(rng.integers(len(groups)))
    groups[index] = (others[rng.integers(len(others))], groups[index][1])
    return dataclasses.replace(spec, groups=tuple(groups))


def _change_count(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec | None:
    if spec.relation is not None:
        return None
    index = int(rng.integers(len(spec.groups)))
    noun, count = spec.groups[index]
    room = MAX_OBJECTS - (spec.num_objects - count)
    counts = [c for c in range(1, room + 1) if c != count]
    if not counts:
        return None
    groups = list(spec.groups)
    groups[index] = (noun, int(rng.choice(counts)))
    return dataclasses.replace(spec, groups=tuple(groups))


def _change_relation(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec | None:
    if spec.relation is None:
        return None
    if spec.relation == "between":
        first, second, third = spec.groups
        groups = (second, first, third) if rng.random() < 0.5 else (third, second, first)
        return dataclasses.replace(spec, groups=groups)
    relations = [r for r in OPPOSITE if r != spec.relation]
    return dataclasses.replace(spec, relation=relations[rng.integers(len(relations))])


def _change_background(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec:
    others = [name for name in BACKGROUNDS if name != spec.background]
    return dataclasses.replace(spec, background=others[rng.integers(len(others))])
