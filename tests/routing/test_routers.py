"""Routers: what they learn, that they survive saving, and that they refuse what they were not made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from catimage_accel.routing import (
    ConstantRouter,
    CountFeatures,
    JointEmbedder,
    KernelRouter,
    KNNRouter,
    NGramEmbedder,
    OracleRouter,
    RandomMixRouter,
    Router,
    ScoreTable,
    TextEncoderEmbedder,
    choose,
    load_router,
    tradeoff_for_budget,
)

NOUNS = ("dog", "cat", "crown", "lemon", "house", "car", "tree", "bear", "boat", "ball", "hat", "cup")


def planted_table(prompts: int = 240, seed: int = 0) -> ScoreTable:
    """The more a prompt names, the worse it is drawn, and the more the dearer candidates help: plus noise."""
    rng = np.random.default_rng(seed)
    texts: dict[str, list[float]] = {}
    while len(texts) < prompts:
        nouns = rng.choice(NOUNS, size=rng.integers(1, 5), replace=False)
        asked = len(nouns)
        text = " and ".join(f"a {noun}" for noun in nouns) + f" on {rng.choice(['blue', 'red', 'green'])}"
        texts[text] = [0.9 - 0.1 * asked * (4 - effort) / 2 + rng.normal() * 0.05 for effort in (1, 2, 3)]
    return ScoreTable(tuple(texts), ("4 steps", "10 steps", "50 steps"), np.array(list(texts.values())), [4.0, 10, 50])


TABLE = planted_table()
ROUTERS = [
    ConstantRouter(), RandomMixRouter(seed=3), KNNRouter(), KNNRouter(CountFeatures(), k=7, shrinkage=0.5),
    KernelRouter(),
]  # fmt: skip


@pytest.mark.parametrize("router", ROUTERS, ids=["constant", "random mix", "k-NN chosen", "k-NN given", "kernel"])
def test_saved_routers_predict_the_same(router: Router, tmp_path: Path) -> None:
    unseen = [*(f"a {noun} and {number} apples" for noun in NOUNS for number in range(4)), "", "\u732b", "z" * 10_000]
    with pytest.raises(ValueError, match="not fitted"):
        type(router)().predict(unseen)
    predicted = router.fit(TABLE).predict(unseen)
    assert predicted.shape == (len(unseen), 3)
    router.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", candidates=TABLE.candidates)
    np.testing.assert_array_equal(loaded.predict(unseen), predicted)
    assert loaded.predict([]).shape == (0, 3)
    loaded.save(tmp_path / "again")
    np.testing.assert_array_equal(load_router(tmp_path / "again").predict(unseen), predicted)
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == ["router.json", "router.safetensors"]


def test_the_oracle_knows_its_prompts_and_no_others(tmp_path: Path) -> None:
    OracleRouter().fit(TABLE).save(tmp_path)
    oracle = load_router(tmp_path)
    np.testing.assert_array_equal(oracle.predict(TABLE.prompts[:5]), TABLE.scores[:5])
    with pytest.raises(ValueError, match="no scores of the prompt 'a walrus'"):
        oracle.predict(["a walrus"])


def test_the_random_mix_deals_neighbours_on_the_hull_by_lot() -> None:
    router = RandomMixRouter().fit(TABLE)
    predicted = router.predict([f"prompt {i}" for i in range(5000)])
    np.testing.assert_allclose(predicted, np.tile(TABLE.mean_scores, (5000, 1)), atol=1e-3)
    chosen = choose(predicted, TABLE.costs, tradeoff_for_budget(predicted, TABLE.costs, 20))
    share = np.bincount(chosen, minlength=3) / len(chosen)
    np.testing.assert_allclose(share, [0, 0.75, 0.25], atol=0.001)
    other = RandomMixRouter(seed=1).fit(TABLE).predict([f"prompt {i}" for i in range(5000)])
    assert (choose(other, TABLE.costs, tradeoff_for_budget(other, TABLE.costs, 20)) != chosen).any()


def test_knn_is_the_mean_of_the_nearest_by_hand() -> None:
    table = ScoreTable(("one", "two words", "three words here", "one " * 30), ("x", "y"),
                       [[1.0, 0.0], [0.0, 1.0], [0.5, 0.9], [0.2, 0.2]], [1.0, 2.0])  # fmt: skip
    nearest = KNNRouter(CountFeatures(), k=1, shrinkage=0.0).fit(table)
    np.testing.assert_allclose(nearest.predict(table.prompts), table.scores, atol=1e-12)
    half = KNNRouter(CountFeatures(), k=1, shrinkage=0.5).fit(table)
    np.testing.assert_allclose(half.predict(table.prompts), (table.scores + table.mean_scores) / 2, atol=1e-12)
    mean = KNNRouter(CountFeatures(), k=4, shrinkage=0.0).fit(table)
    np.testing.assert_allclose(mean.predict(["anything"]), [table.mean_scores], atol=1e-12)


def test_knn_chooses_for_difficulty_and_gaps_apart() -> None:
    rng = np.random.default_rng(1)
    noise = ScoreTable(TABLE.prompts, TABLE.candidates, TABLE.scores.mean(axis=1, keepdims=True)
                       + rng.normal(size=TABLE.scores.shape) * 0.05, TABLE.costs)  # fmt: skip
    router = KNNRouter().fit(noise)
    assert router.gaps.shrinkage > 0.5, "gaps that are noise are shrunk away"
    assert router.difficulty.shrinkage < 0.2, "difficulty that shows in the text is not"


def test_knn_ignores_row_order_and_company() -> None:
    router = KNNRouter().fit(TABLE)
    shuffled = KNNRouter().fit(TABLE.select(np.random.default_rng(0).permutation(len(TABLE))))
    unseen = [f"a {noun} and a walrus" for noun in NOUNS]
    np.testing.assert_allclose(shuffled.predict(unseen), router.predict(unseen), atol=1e-12)
    alone = np.concatenate([router.predict([prompt]) for prompt in unseen])
    np.testing.assert_array_equal(alone, router.predict(unseen))


@pytest.mark.parametrize(
    ("make", "rows", "said"),
    [
        pytest.param(lambda: KNNRouter(k=50), 20, "k is 50, but the table has 20 prompts", id="fewer prompts than k"),
        pytest.param(lambda: KNNRouter(), 1, "1 prompt, expected 2 or more", id="nothing to choose by"),
        pytest.param(lambda: KNNRouter(k=0), 20, "k is 0, expected an integer >= 1", id="no neighbours"),
        pytest.param(lambda: KNNRouter(shrinkage=1.5), 20, "shrinkage is 1.5, expected a number", id="over 1"),
        pytest.param(lambda: KNNRouter(shrinkage=float("nan")), 20, "shrinkage is nan", id="NaN shrinkage"),
    ],
)
def test_knn_refuses(make: object, rows: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make().fit(TABLE.select(range(rows)))  # type: ignore[operator]


def test_two_prompts_and_one_candidate_are_enough() -> None:
    router = KNNRouter().fit(TABLE.select([0, 1]).restrict(["10 steps"]))
    assert router.predict(["a dog"]).shape == (1, 1)


def test_a_router_for_other_candidates_is_refused_naming_both(tmp_path: Path) -> None:
    KNNRouter().fit(TABLE).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"fitted for the candidates 4 steps, 10 steps, 50 steps, .* with 4 steps, lcm"
    ):
        load_router(tmp_path, candidates=["4 steps", "lcm"])
    with pytest.raises(ValueError, match="fit it again"):
        load_router(tmp_path, candidates=["50 steps", "10 steps", "4 steps"])


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    KNNRouter().fit(TABLE).save(folder)
    described = json.loads((folder / "router.json").read_text())
    tensors = (folder / "router.safetensors").read_bytes()
    assert set(load_file(folder / "router.safetensors")) == {"vectors", "centre", "scale", "scores", "probe"}

    (folder / "router.safetensors").write_bytes(tensors[:-8])
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load_router(folder)
    (folder / "router.safetensors").write_bytes(tensors)
    for change, said in (
        ({"kind": "oracle of delphi"}, "kind 'oracle of delphi', expected kernel"),
        ({"format": 99}, "format 99, expected 1"),
        ({"settings": {}}, "settings are missing or wrong"),
        ({"candidates": ["only one"]}, "scores has shape"),
    ):
        (folder / "router.json").write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=said):
            load_router(folder)
    (folder / "router.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="not a router's description"):
        load_router(folder)
    (folder / "router.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no router\.json"):
        load_router(folder)


def test_a_catalog_moves_with_its_text_encoder(tiny_sd_folder: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_sd_folder / part, catalog / "model" / part)
    embedder = JointEmbedder(TextEncoderEmbedder(catalog / "model"), CountFeatures())
    router = KNNRouter(embedder).fit(TABLE)
    router.save(catalog / "router")
    moved = catalog.rename(tmp_path / "moved")
    loaded = load_router(moved / "router")
    np.testing.assert_allclose(loaded.predict(["a bear"]), router.predict(["a bear"]), atol=1e-9)
    assert load_router(moved / "router", embedder).predict(["a bear"]).shape == (1, 3)
    with pytest.raises(ValueError, match=r"was fitted with the embedder .*text_encoder.* fit it again"):
        load_router(moved / "router", JointEmbedder(NGramEmbedder(32), CountFeatures()))
