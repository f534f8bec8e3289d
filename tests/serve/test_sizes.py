"""Sizes of a catalog whose candidates were trained on different ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from serving import start_server

from catimage_accel.catalog import Catalog
from catimage_accel.serve.sizes import CatalogSizes, Size, SizeLimits

SMALL, LARGE = SizeLimits(8, 32, 128), SizeLimits(8, 128, 512)


@pytest.fixture(scope="module")
def mixed(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """As the tiny catalog, but "dear-4" draws 256x256 where the others draw 64x64."""
    folder = Path(shutil.copytree(tiny_catalog, tmp_path_factory.mktemp("mixed") / "catalog"))
    shutil.copytree(folder / "model", folder / "large")
    config = folder / "large" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    catalog = Catalog.load(folder, verify=False)
    candidates = tuple(replace(one, model="large") if one.name == "dear-4" else one for one in catalog.candidates)
    replace(catalog, candidates=candidates).save(folder).write_checksums()
    return Catalog.load(folder)


@pytest.fixture(scope="module")
def sizes(mixed: Catalog) -> CatalogSizes:
    return CatalogSizes.of_catalog(mixed)


def test_limits_are_those_of_each_candidate(sizes: CatalogSizes) -> None:
    assert sizes.limits == {"cheap-2": SMALL, "middle-3": SMALL, "dear-4": LARGE}
    assert sizes.widest == SizeLimits(8, 32, 512)


@pytest.mark.parametrize(
    ("size", "candidate", "expected"),
    [
        (None, None, Size()),
        ("auto", "dear-4", Size()),
        ("64x48", None, Size(48, 64, frozenset({"dear-4"}))),
        ("256x512", None, Size(512, 256, frozenset({"cheap-2", "middle-3"}))),
        ("128x128", None, Size(128, 128)),
        ("64x64", "cheap-2", Size(64, 64, frozenset({"dear-4"}))),
        ("256x256", "dear-4", Size(256, 256, frozenset({"cheap-2", "middle-3"}))),
    ],
    ids=["none", "auto", "of-the-small", "of-the-large", "of-both", "named-small", "named-large"],
)
def test_a_size_that_some_candidate_draws_is_accepted(
    sizes: CatalogSizes, size: str | None, candidate: str | None, expected: Size
) -> None:
    assert sizes.parse(size, candidate) == expected


@pytest.mark.parametrize(
    ("size", "candidate", "accepted"),
    [
        ("64x256", None, "from 32 to 128 pixels, multiples of 8; or from 128 to 512 pixels, multiples of 8"),
        ("65x64", None, "from 32 to 128 pixels"),
        ("0x64", None, "WIDTHxHEIGHT"),
        ("64 x 64", None, "WIDTHxHEIGHT"),
        ("64x64", "dear-4", "by candidate 'dear-4': auto, or WIDTHxHEIGHT with sides from 128 to 512 pixels"),
    ],
    ids=["a-side-for-each", "odd", "nothing", "no-size", "not-by-the-named-one"],
)
def test_others_are_refused(sizes: CatalogSizes, size: str, candidate: str | None, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"size is '{size}'; accepted") as raised:
        sizes.parse(size, candidate)
    assert accepted in str(raised.value)


def test_the_server_routes_among_those_that_draw_the_size(mixed: Catalog) -> None:
    server = start_server(mixed.folder, "--latency-target", "0")
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for size, chosen in (("64x64", "middle-3"), ("256x256", "dear-4")):
                # The dearest is worth most to a crowd, and nothing to a single dog.
                prompt = "a dog, a cat and three crowns" if chosen == "middle-3" else "a dog"
                body = {"prompt": prompt, "tradeoff": 0.001, "size": size}
                answer = http.post("/v1/images/generations", json=body).json()
                assert (answer["data"][0]["route"]["candidate"], answer["size"]) == (chosen, size)
            body = {"prompt": "a dog", "candidate": "cheap-2", "size": "256x256"}
            refused = http.post("/v1/images/generations", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "size")
            models = http.get("/v1/models").json()["data"]
            assert models[0]["catalog"]["sizes"] == {"step": 8, "least": 32, "most": 512}
            assert models[-1]["candidate"]["sizes"] == {"step": 8, "least": 128, "most": 512}
    finally:
        server.stop()
