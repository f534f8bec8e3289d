"""Catalogs: what is written is read back; what is wrong is named in one line before any work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import catimage_accel
from catimage_accel import Candidate, Catalog
from catimage_accel.storage import write_atomic

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,20}", fullmatch=True)
candidates = st.builds(
    Candidate,
    name=names,
    model=st.just("model"),
    steps=st.integers(1, 1000),
    sampler=st.sampled_from(["ddim", "euler", "dpmsolver++"]),
    guidance_scale=st.floats(0, 100),
    guidance_rescale=st.sampled_from([0.0, 0.7]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    options=st.sampled_from([{}, {"deepcache_interval": 3}]),
    vae=st.sampled_from(["vae", "vae_small"]),
)


@pytest.fixture
def catalog_copy(tiny_catalog: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_catalog, tmp_path / "catalog"))


def one_line(call: Callable[[], object], *parts: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, catimage_accel as ca;"
        "heavy = {'torch', 'transformers', 'tensorrt', 'onnxruntime', 'ray', 'modelopt'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert {'accelerate', 'restore', 'RoutedPipeline', 'Catalog', 'Candidate', 'Router'} <= set(dir(ca))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_are_there_and_no_others() -> None:
    for name in catimage_accel.__all__:
        assert callable(getattr(catimage_accel, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = catimage_accel.nonsense


def test_importing_the_submodule_does_not_hide_the_function_accelerate() -> None:
    code = "import catimage_accel.accelerate, catimage_accel as ca; assert not isinstance(ca.accelerate, type(ca))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@given(st.lists(candidates, min_size=1, max_size=4, unique_by=lambda one: one.name), st.floats(0, 10), names)
@settings(max_examples=30, deadline=None)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, listed: list[Candidate], tradeoff: float, name: str
) -> None:
    folder = tmp_path_factory.mktemp("catalog")
    for part in ("unet", "vae_small"):
        (folder / "model" / part).mkdir(parents=True)
        (folder / "model" / part / "config.json").write_text("{}")
    flops = {candidate.name: candidate.steps * 10**9 for candidate in listed}
    saved = Catalog(folder, name, tuple(listed), tradeoff=tradeoff, flops=flops).save(folder)
    loaded = Catalog.load(folder)
    assert loaded == saved
    assert loaded.costs == {candidate.name: float(candidate.steps) for candidate in listed}


def test_a_whole_catalog_gives_scores_and_a_router_for_its_candidates(tiny_catalog: Path) -> None:
    catalog = Catalog.load(tiny_catalog)
    assert catalog.costs == {"cheap-2": 1.0, "middle-3": 3.0, "dear-4": 8.0}
    assert catalog.quality_table().candidates == tuple(catalog.costs) == catalog.router().candidates
    assert catalog.candidate("middle-3").options == {"deepcache_interval": 2}
    one_line(lambda: catalog.candidate("best"), "'best'", "cheap-2, middle-3, dear-4")


def test_saved_elsewhere_it_still_finds_its_models(tiny_catalog: Path, tmp_path: Path) -> None:
    moved = Catalog.load(tiny_catalog).save(tmp_path / "moved")
    loaded = Catalog.load(tmp_path / "moved")
    assert loaded == moved
    assert loaded.resolve_model(loaded.candidates[0].model).samefile(tiny_catalog / "model")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        pytest.param('name = "tiny"', 'nmae = "tiny"', ["nmae", "accepted: name"], id="misspelt-key"),
        pytest.param("steps = 4", "steps = 4\nstep = 4", ["step is 4", "accepted", "steps"], id="unknown-key"),
        pytest.param("deepcache_interval", "deepcache", ["options.deepcache", "_interval"], id="unknown-option"),
        pytest.param("steps = 4", "steps = 0", ["steps is 0", "greater than or equal to 1"], id="no-steps"),
        pytest.param("steps = 4", 'steps = "4"', ["steps is '4'", "valid integer"], id="number-as-text"),
        pytest.param("steps = 4", "steps = true", ["steps is True", "valid integer"], id="true-is-no-number"),
        pytest.param("guidance_scale = 3.0", "guidance_scale = nan", ["is nan", "finite"], id="nan"),
        pytest.param("guidance_scale = 3.0", "guidance_scale = -1.0", ["is -1.0", "greater"], id="negative-guidance"),
        pytest.param("steps = 4", "steps = 4\nguidance_rescale = 1.5", ["is 1.5", "less than or"], id="rescale-past-1"),
        pytest.param("tradeoff = 0.05", "tradeoff = inf", ["tradeoff is inf", "finite"], id="infinite-tradeoff"),
        pytest.param("euler", "heun", ["'heun'", "'euler_ancestral', 'dpmsolver++' or 'lcm'"], id="unknown-sampler"),
        pytest.param('"fp32"', '"int4"', ["'int4'", "'fp32', 'bf16', 'fp16', 'int8' or 'fp8'"], id="unknown-precision"),
        pytest.param('"auto"', '"magic"', ["'magic'", "'auto', 'eager', 'fused', 'compiled'"], id="unknown-engine"),
        pytest.param('"dear-4"', '"cheap-2"', ["'cheap-2' occurs 2 times"], id="same-name-twice"),
        pytest.param('unet = "unet"', 'unet = "../unet"', ["'../unet'"], id="unet-outside-the-model"),
        pytest.param("steps = 4", 'steps = 4\nvae = "../vae"', ["vae is '../vae'"], id="vae-outside-the-model"),
        pytest.param("[[candidate]]", "[[candidate]", ["not valid TOML"], id="not-toml"),
    ],
)
def test_a_wrong_catalog_is_refused(catalog_copy: Path, old: str, new: str, parts: list[str]) -> None:
    path = catalog_copy / "catalog.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    one_line(lambda: Catalog.load(catalog_copy, verify=False), str(path), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param('{"flops": {"cheap-2": NaN}}', ["flops.cheap-2 is nan"], id="nan"),
        pytest.param('{"flops": {"cheap-2": -5}}', ["flops.cheap-2 is -5", "greater than 0"], id="negative"),
        pytest.param('{"flops": {}, "watts": 3}', ["watts is 3", "accepted: flops, milliseconds"], id="unknown-key"),
        pytest.param('{"flops": ', ["not valid JSON"], id="cut-off"),
    ],
)
def test_wrong_costs_are_refused(catalog_copy: Path, content: str, parts: list[str]) -> None:
    (catalog_copy / "costs.json").write_text(content)
    one_line(lambda: Catalog.load(catalog_copy, verify=False), "costs.json", *parts)


def test_costs_of_an_unprofiled_catalog_say_how_to_measure_them(catalog_copy: Path) -> None:
    (catalog_copy / "costs.json").unlink()
    catalog = Catalog.load(catalog_copy, verify=False)
    one_line(lambda: catalog.costs, "no flops for cheap-2", "catimage profile")


@pytest.mark.parametrize(
    ("removed", "use"),
    [
        pytest.param("catalog.toml", lambda catalog: catalog, id="catalog"),
        pytest.param("model", lambda catalog: catalog, id="model"),
        pytest.param("model/unet/config.json", lambda catalog: catalog, id="unet"),
        pytest.param("judge", lambda catalog: catalog, id="judge"),
        pytest.param("quality.parquet", lambda catalog: catalog.quality_table(), id="scores"),
        pytest.param("router", lambda catalog: catalog.router(), id="router"),
    ],
)
def test_a_missing_file_is_named(catalog_copy: Path, removed: str, use: Callable[[Catalog], object]) -> None:
    path = catalog_copy / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    one_line(lambda: use(Catalog.load(catalog_copy, verify=False)), str(path), kind=FileNotFoundError)


def test_a_vae_is_written_where_it_is_not_the_models_own(catalog_copy: Path) -> None:
    path = catalog_copy / "catalog.toml"
    assert "vae" not in path.read_text()
    path.write_text(path.read_text().replace("steps = 4", 'steps = 4\nvae = "vae_small"'))
    missing = str(catalog_copy / "model" / "vae_small" / "config.json")
    parts = [missing, "dear-4: vae is 'vae_small'"]
    one_line(lambda: Catalog.load(catalog_copy, verify=False), *parts, kind=FileNotFoundError)
    shutil.copytree(catalog_copy / "model" / "vae", catalog_copy / "model" / "vae_small")
    Catalog.load(catalog_copy, verify=False).save(catalog_copy)
    assert path.read_text().count("vae = ") == 1
    assert [one.vae for one in Catalog.load(catalog_copy, verify=False).candidates] == ["vae", "vae", "vae_small"]


def test_a_judge_may_be_a_hub_id(catalog_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalog_copy / "catalog.toml"
    path.write_text(path.read_text().replace('judge = "judge"', 'judge = "owner/clip"'))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    catalog = Catalog.load(catalog_copy, verify=False)
    one_line(lambda: catalog.judge_folder, "'owner/clip'", "the hub", kind=FileNotFoundError)
    repository = tmp_path / "hub" / "models--owner--clip"
    shutil.move(catalog_copy / "judge", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert (catalog.judge_folder / "model.safetensors").is_file()


@pytest.mark.parametrize("source", ["no-such-folder", "nobody/nothing-here", "", 7])
def test_an_unknown_catalog_is_named(source: object) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        Catalog.load(source)  # type: ignore[arg-type]
    assert repr(source) in str(raised.value)
    assert "\n" not in str(raised.value)


WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


def test_truncated_weights_are_named(catalog_copy: Path) -> None:
    content = (catalog_copy / WEIGHTS).read_bytes()
    (catalog_copy / WEIGHTS).write_bytes(content[:-100])
    one_line(lambda: Catalog.load(catalog_copy), WEIGHTS, "truncated", str(len(content)))


def test_tampered_weights_are_named(catalog_copy: Path) -> None:
    content = bytearray((catalog_copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (catalog_copy / WEIGHTS).write_bytes(content)
    one_line(lambda: Catalog.load(catalog_copy), WEIGHTS, "was changed", "sha256")


def test_missing_weights_are_named(catalog_copy: Path) -> None:
    (catalog_copy / WEIGHTS).unlink()
    one_line(lambda: Catalog.load(catalog_copy).verify(), WEIGHTS, "missing", kind=FileNotFoundError)


def test_checksums_written_again_accept_what_is_there(catalog_copy: Path) -> None:
    write_atomic(catalog_copy / "note.txt", b"changed on purpose")
    Catalog.load(catalog_copy).write_checksums()
    assert "note.txt" in json.loads((catalog_copy / "checksums.json").read_text())["files"]
    Catalog.load(catalog_copy).verify()


def test_a_router_of_other_candidates_is_refused(catalog_copy: Path) -> None:
    path = catalog_copy / "catalog.toml"
    path.write_text(path.read_text().replace('"dear-4"', '"dearest-4"'))
    one_line(lambda: Catalog.load(catalog_copy, verify=False).router(), "dear-4", "dearest-4")
