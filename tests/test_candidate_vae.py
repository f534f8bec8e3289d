"""Candidates of one UNet with decoders of their own: batches are shared, pictures and what is cached are not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from typer.testing import CliRunner

from catimage_accel import Candidate, Catalog
from catimage_accel.cli import app
from catimage_accel.engines import EagerEngine, EngineUnavailable, LoadedEngines, check_model_folder
from catimage_accel.engines.cache import EngineCache
from catimage_accel.executor import Executor, Finished, Job
from catimage_accel.profiling import count_flops
from catimage_accel.snapfusion.pruning import pruned_decoder

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a second VAE, ``vae_small``, whose decoder has half of the channels."""
    made = Path(shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("two-decoders") / "model"))
    whole = AutoencoderKL.from_pretrained(made, subfolder="vae")
    pruned_decoder(whole, 0.5).save_pretrained(made / "vae_small")
    return made


@pytest.fixture(scope="module")
def only_small(folder: Path) -> Path:
    """The same model with the small VAE as its only one."""
    made = Path(shutil.copytree(folder, folder.parent / "only-small"))
    shutil.rmtree(made / "vae")
    (made / "vae_small").rename(made / "vae")
    return made


def candidate(folder: Path, vae: str = "vae", **more: Any) -> Candidate:
    return Candidate(f"by-{vae}", str(folder), 3, "ddim", 2.0, vae=vae, **more)


def drawn(executor: Executor, candidates: list[Candidate]) -> list[Finished]:
    jobs = [Job("a dog", one, torch.Generator().manual_seed(7), key=key) for key, one in enumerate(candidates)]
    found = sorted(executor.run(jobs), key=lambda one: one.key)
    assert [one.error for one in found] == [None] * len(candidates)
    return found


def test_they_share_batches_and_each_has_the_picture_of_its_own_decoder(
    folder: Path, only_small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [drawn(Executor(device="cpu"), [candidate(model)])[0].image for model in (folder, only_small)]
    assert np.abs(expected[0].astype(int) - expected[1]).mean() > 1, "two decoders, two pictures"
    executor = Executor(device="cpu")
    both = [candidate(folder), candidate(folder, "vae_small"), candidate(folder)]
    engine = executor.prepare(both[0])[0]
    assert executor.prepare(both[1])[0] is engine
    rows: list[int] = []
    denoise = engine.denoise

    def counted(sample: Tensor, *args: Any, **named: Any) -> Tensor:
        rows.append(len(sample))
        return denoise(sample, *args, **named)

    monkeypatch.setattr(engine, "denoise", counted)
    found = drawn(executor, both)
    assert rows == [6, 6, 6], "three images in a batch, with guidance"
    for one, picture in zip(found, (expected[0], expected[1], expected[0]), strict=True):
        assert np.abs(one.image.astype(int) - picture).max() <= 1


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_every_engine_decodes_with_the_one_it_is_told(
    folder: Path, only_small: Path, tmp_path: Path, name: str
) -> None:
    engines = LoadedEngines(CPU, EngineCache(tmp_path), fall_back=False)
    engine = engines.get(folder, "unet", (name,), vae="vae_small")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for model, vae in ((only_small, "vae_small"), (folder, "vae"), (only_small, "vae_small")):
        wanted = EagerEngine(model).decode(latents)
        torch.testing.assert_close(engine.decode(latents, vae), wanted, rtol=1e-3, atol=1e-4)
    assert not getattr(engine, "given_up", ())


def test_a_decoder_that_a_runtime_fails_at_is_replaced_by_itself(
    folder: Path, only_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = LoadedEngines(CPU, EngineCache(tmp_path)).get(folder, "unet", ("onnxruntime",), vae="vae_small")
    runner, made = engine.runtime.runner, []

    def failing(component: Any, *args: Any) -> Any:
        if component.vae != "vae_small":
            return runner(component, *args)
        made.append(component)

        def run(_: Any) -> Any:
            raise EngineUnavailable("no such operator")

        return run

    monkeypatch.setattr(engine.runtime, "runner", failing)
    latents = torch.randn(2, 4, 16, 16)
    with pytest.warns(UserWarning, match=r"no decoder for .*vae_small: no such operator"):
        found = engine.decode(latents, "vae_small")
    torch.testing.assert_close(found, EagerEngine(only_small).decode(latents))
    engine.decode(latents)
    assert engine.given_up == {"vae_decoder (vae_small)"}
    assert len(made) == 1


def test_both_are_built_beforehand_and_apart(
    tiny_catalog: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path / "engines"))
    two = dataclasses.replace(
        Catalog.load(tiny_catalog), candidates=(candidate(folder), candidate(folder, "vae_small")), flops={}
    ).save(tmp_path / "catalog")
    asked = ["engine", "build", str(two.folder), "--engine", "onnxruntime", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["part"] for row in rows] == ["unet", "vae", "vae_small"]
    assert len({row["digest"] for row in rows}) == 3


def test_its_flops_are_its_own(tiny_catalog: Path, folder: Path) -> None:
    two = (candidate(folder), candidate(folder, "vae_small"))
    catalog = dataclasses.replace(Catalog.load(tiny_catalog), candidates=two)
    flops = count_flops(catalog)
    assert flops["by-vae_small"] < flops["by-vae"]


def test_it_is_listed(tiny_catalog: Path, folder: Path, tmp_path: Path) -> None:
    catalog = dataclasses.replace(Catalog.load(tiny_catalog), flops={}, milliseconds={}, judge=None)
    two = (candidate(folder), candidate(folder, "vae_small"))
    for number, told in ((1, ["vae"]), (2, ["vae", "vae_small"])):
        saved = dataclasses.replace(catalog, candidates=two[:number]).save(tmp_path / f"catalog-{number}")
        asked = ["candidates", "--catalog", str(saved.folder)]
        lines = CliRunner().invoke(app, [*asked, "--json"]).stdout.splitlines()
        assert [json.loads(line)["vae"] for line in lines] == told
        table = CliRunner().invoke(app, asked)
        assert table.exit_code == 0, table.output
        assert (", vae_small," in table.stdout) == (number == 2), "told only where it is not the model's own"


def other_channels(vae: Path) -> None:
    AutoencoderKL(**{**dict(AutoencoderKL.from_pretrained(vae).config), "latent_channels": 8}).save_pretrained(vae)


def fewer_stages(vae: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4,
    ).save_pretrained(vae)  # fmt: skip


def another_class(vae: Path) -> None:
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        pytest.param(other_channels, r"are \(8, 4\); accepted: \(4, 4\)", id="latents of other channels"),
        pytest.param(fewer_stages, r"are \(4, 2\); accepted: \(4, 4\)", id="pictures of another size"),
        pytest.param(another_class, "'AutoencoderTiny'; accepted: AutoencoderKL, EfficientDecoderKL", id="class"),
        pytest.param(lambda vae: (vae / WEIGHTS).unlink(), f"has no {WEIGHTS}", id="no weights"),
        pytest.param(shutil.rmtree, r"vae_other/config\.json is missing", id="no folder"),
    ],
)
def test_one_that_does_not_fit_the_model_is_refused(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], told: str
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copytree(model / "vae", model / "vae_other")
    check_model_folder(model, vae="vae_other")
    spoil(model / "vae_other")
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        Executor(device="cpu").check(candidate(model, "vae_other"))


def test_weights_that_can_t_be_read_are_known_before_drawing_and_cost_no_other_its_picture(
    folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    path = model / "vae_small" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    executor = Executor(device="cpu")
    with pytest.raises((OSError, ValueError), match="vae_small"):
        executor.prepare(candidate(model, "vae_small"))
    drawn(executor, [candidate(model)])
