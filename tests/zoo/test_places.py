"""What training is told of a scene beyond its picture and its caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from catimage_accel import Catalog
from catimage_accel.zoo.objects import NOUNS
from catimage_accel.zoo.scenes import SceneSpec, lay_out
from catimage_accel.zoo.training.places import PlaceLoss, noun_of_token, noun_places


def test_noun_places_are_the_means_of_the_objects_that_are_there():
    scene = lay_out(SceneSpec((("dog", 2), ("cat", 1)), "pink"), np.random.default_rng(0))
    places = noun_places(scene)
    dogs = [(placed.x, placed.y) for placed in scene.objects if placed.noun == "dog"]
    assert np.isfinite(places).all(axis=1).sum() == 2
    assert places[NOUNS.index("dog")] * 32 + 32 == pytest.approx(np.mean(dogs, axis=0), abs=1e-4)


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("an apple to the left of a pineapple on blue", ["apple", "pineapple"]),
        ("two mice and three cactuses on a pink background", ["mouse", "cactus"]),
        ("an orange on an orange background", []),
    ],
    ids=["one word within another", "irregular plurals", "a word that is no noun of ours"],
)
def test_tokens_tell_the_noun_that_they_spell(caption, nouns):
    tokenizer = CLIPTokenizer.from_pretrained(Catalog.load("emoji").judge_folder)
    found = noun_of_token(tokenizer)[tokenizer(caption, return_tensors="pt").input_ids[0]]
    assert [NOUNS[i] for i in found.tolist() if i >= 0] == nouns


def test_place_loss_counts_the_nouns_of_captions_that_tell_a_direction():
    tokenizer = CLIPTokenizer.from_pretrained(Catalog.load("emoji").judge_folder)
    pair = (("dog", 1), ("cat", 1))
    specs = [SceneSpec(pair, "pink", "left"), SceneSpec(pair, "pink")]
    layouts = [lay_out(spec, np.random.default_rng(0)) for spec in specs]
    ids = tokenizer(
        ["a dog left of a cat on pink", "a dog and a cat on pink"], padding=True, return_tensors="pt"
    ).input_ids
    loss = PlaceLoss(layouts, tokenizer)
    guess = torch.zeros(*ids.shape, 2)
    for position, token in enumerate(ids[0].tolist()):
        noun = int(noun_of_token(tokenizer)[token])
        if noun >= 0:
            guess[0, position] = torch.from_numpy(noun_places(layouts[0])[noun])
    assert loss(guess, ids, torch.tensor([0, 1])) == 0
    assert loss(-guess, ids, torch.tensor([0, 1])) > 0.1
    assert loss(guess + 1, ids, torch.tensor([1, 1])) == 0
