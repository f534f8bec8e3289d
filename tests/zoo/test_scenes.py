"""Scenes say what their captions say, and vary in everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel.zoo.captions import caption, near_misses
from catimage_accel.zoo.objects import NOUNS, article, object_pictures, plural
from catimage_accel.zoo.render import render
from catimage_accel.zoo.scenes import (
    BACKGROUNDS,
    IMAGE_SIZE,
    SceneSpec,
    draw_spec,
    lay_out,
    mirrored_spec,
    relation_holds,
)

seeds = st.integers(0, 2**32 - 1)


def spec_and_scene(seed: int):
    rng = np.random.default_rng(seed)
    spec = draw_spec(rng)
    return spec, lay_out(spec, rng)


def test_vocabulary_is_large_enough_and_every_noun_has_a_picture():
    assert len(NOUNS) >= 100
    assert len(BACKGROUNDS) >= 8
    assert set(object_pictures()) == set(NOUNS)
    assert all(picture.getbbox() for picture in object_pictures().values())


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_scene_holds_the_objects_and_relation_its_caption_names(seed):
    spec, scene = spec_and_scene(seed)
    assert 1 <= spec.num_objects <= 4
    placed = [item.noun for item in scene.objects]
    assert sorted(placed) == sorted(noun for noun, count in spec.groups for _ in range(count))
    centres = np.array([(item.x, item.y) for item in scene.objects])
    sizes = np.array([item.size for item in scene.objects])
    assert relation_holds(centres, sizes, spec.relation)
    assert np.all(centres > 0)
    assert np.all(centres < IMAGE_SIZE)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_caption_names_every_noun_in_its_number_and_the_background(seed):
    rng = np.random.default_rng(seed)
    spec = draw_spec(rng)
    text = caption(spec, rng)
    for noun, count in spec.groups:
        assert (f"{article(noun)} {noun}" if count == 1 else plural(noun)) in text
    assert spec.background in text
    assert text == text.lower()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_near_misses_are_fifteen_other_meanings(seed):
    rng = np.random.default_rng(seed)
    spec = draw_spec(rng)
    misses = near_misses(spec, 15, rng)
    assert len(set(misses)) == 15
    assert spec not in misses
    assert all(1 <= miss.num_objects <= 4 for miss in misses)


def test_what_the_caption_leaves_open_differs_between_two_scenes_of_one_meaning():
    spec = SceneSpec((("dog", 1), ("lemon", 2)), "pink")
    first, second = (lay_out(spec, np.random.default_rng(seed)) for seed in (0, 1))
    for name in ("x", "y", "size", "angle"):
        assert [getattr(o, name) for o in first.objects] != [getattr(o, name) for o in second.objects]
    assert np.abs(render(first).astype(int) - render(second)).mean() > 5


def test_a_seed_names_a_scene():
    assert spec_and_scene(5) == spec_and_scene(5)
    assert np.array_equal(render(spec_and_scene(5)[1]), render(spec_and_scene(5)[1]))


def test_rendered_background_keeps_the_colour_it_is_named_after():
    for name, colour in BACKGROUNDS.items():
        picture = render(lay_out(SceneSpec((("bee", 1),), name), np.random.default_rng(3)))
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
        distances = {other: np.abs(np.median(corners, 0) - np.array(rgb)).sum() for other, rgb in BACKGROUNDS.items()}
        assert min(distances, key=distances.get) == name, colour


@pytest.mark.parametrize("split", ["train", "test"])
def test_hold_out_is_by_meaning_not_by_wording_or_order(split):
    rng = np.random.default_rng(0)
    specs = [draw_spec(rng, split) for _ in range(200)]
    assert {spec.split for spec in specs} == {split}
    reordered = [SceneSpec(tuple(reversed(spec.groups)), spec.background) for spec in specs if len(spec.groups) > 1]
    assert {spec.split for spec in reordered} == {split}
    assert any(spec.groups != again.groups for spec, again in zip(specs, reordered, strict=False))


@pytest.mark.parametrize(
    ("relation", "mirrored"),
    [("left", "right"), ("right", "left"), ("above", "above"), ("between", "between"), (None, None)],
)
def test_mirroring_exchanges_left_and_right_alone(relation, mirrored):
    spec = SceneSpec((("dog", 1), ("cat", 1), ("bee", 1)), "pink", relation)
    assert mirrored_spec(spec) == dataclasses.replace(spec, relation=mirrored)


def test_odds_choose_what_near_misses_change():
    spec = SceneSpec((("dog", 1), ("cat", 1)), "pink", "left")
    misses = near_misses(spec, 3, np.random.default_rng(0), (0.0, 0.0, 1.0, 0.0))
    assert {miss.relation for miss in misses} == {"right", "above", "below"}
