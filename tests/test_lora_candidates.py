"""LoRA in the executor and the engines, against diffusers' pipeline with the same LoRA loaded."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from typer.testing import CliRunner

from catimage_accel import Catalog
from catimage_accel.candidate import Candidate
from catimage_accel.cli import app
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.loading import load_unet
from catimage_accel.executor import Executor, Job
from catimage_accel.lora import AdaptedUNet
from catimage_accel.quantize.quantization import weights_sha256

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "time_emb_proj"]


def save_lora(model: Path, file: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random LoRA of ``model``'s UNet, as diffusers' training scripts save it, with an effect that shows."""
    torch.manual_seed(seed)
    unet = load_unet(model, "unet", torch.float32)
    unet.add_adapter(LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False} | config))
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(
        file.parent, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=file.name,
        **_collate_lora_metadata({"unet": unet}),
    )  # fmt: skip
    return file


def kohya(file: Path) -> Path:
    """``file`` in kohya's names, with an alpha that is not the rank."""
    ours = safetensors.torch.load_file(file)
    theirs: dict[str, torch.Tensor] = {}
    for name, value in ours.items():
        module = name.removeprefix("unet.").replace(".lora_A.weight", "").replace(".lora_B.weight", "")
        flat = f"lora_unet_{module.replace('.', '_')}"
        theirs[f"{flat}.{'lora_down' if 'lora_A' in name else 'lora_up'}.weight"] = value
        theirs[f"{flat}.alpha"] = torch.tensor(1.0)
    path = file.with_name("kohya.safetensors")
    safetensors.torch.save_file(theirs, path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATIMAGE_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def lora(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    return save_lora(tiny_sd_folder, tmp_path / "lora.safetensors")


def draw(candidates: list[Candidate], *, executor: Executor | None = None) -> list[torch.Tensor]:
    executor = executor or Executor(device="cpu", fall_back=False)
    jobs = [Job("a dog", one, torch.Generator().manual_seed(3), key=index) for index, one in enumerate(candidates)]
    found = {}
    for outcome in executor.run(jobs):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.latents is not None
        found[outcome.key] = outcome.latents
    return [found[index] for index in range(len(jobs))]


def with_diffusers(kind: Any, model: Path, lora: Path | None, scale: float, *, steps: int, guidance: float) -> Any:
    pipe = kind.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(DDIMScheduler.load_config(model / "scheduler"))
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="one")
        pipe.set_adapters("one", scale)
    return pipe(
        "a dog", num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"lora_alpha": 8}, id="alpha other than the rank, as the file's header tells"),
        pytest.param({"r": 4, "lora_alpha": 1, "rank_pattern": {"conv1": 2}}, id="ranks by layer"),
        pytest.param({"r": 4, "lora_alpha": 4, "use_rslora": True}, id="scaled by the rank's root"),
        pytest.param({"use_dora": True, "target_modules": ["to_q", "to_v"]}, id="DoRA"),
    ],
)
def test_how_it_was_trained_is_read_from_the_file(tiny_sd_folder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    file = save_lora(tiny_sd_folder, tmp_path / "lora.safetensors", **config)
    [latents] = draw([Candidate("one", str(tiny_sd_folder), 4, "lcm", 2.0, lora=str(file), lora_scale=0.6)])
    expected = with_diffusers(StableDiffusionPipeline, tiny_sd_folder, file, 0.6, steps=4, guidance=2.0)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [1.0, -0.6])
@pytest.mark.parametrize("named", [pytest.param(lambda file: file, id="diffusers' names"), kohya])
@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        pytest.param("tiny_sd_folder", StableDiffusionPipeline, id="SD"),
        pytest.param("tiny_sdxl_folder", StableDiffusionXLPipeline, id="SDXL"),
    ],
)
def test_pictures_are_those_of_diffusers_with_the_lora(
    request: pytest.FixtureRequest, tmp_path: Path, folder: str, kind: Any, named: Callable[[Path], Path], scale: float
) -> None:
    model = request.getfixturevalue(folder)
    file = named(save_lora(model, tmp_path / "lora.safetensors"))
    plain = Candidate("plain", str(model), 4, "lcm", 2.0)
    changed = dataclasses.replace(plain, name="changed", lora=str(file), lora_scale=scale)
    first, second = draw([plain, changed])
    torch.testing.assert_close(first, with_diffusers(kind, model, None, 1.0, steps=4, guidance=2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        second, with_diffusers(kind, model, file, scale, steps=4, guidance=2.0), atol=1e-3, rtol=0
    )
    assert not torch.allclose(first, second, atol=1e-2)


def test_every_engine_draws_with_it(tiny_sd_folder: Path, lora: Path) -> None:
    eager = Candidate("one", str(tiny_sd_folder), 3, "ddim", 3.0, lora=str(lora), engine="eager")
    expected, *others = draw([eager, *(dataclasses.replace(eager, engine=one) for one in ("onnxruntime", "openvino"))])
    for other in others:
        torch.testing.assert_close(other, expected, atol=1e-3, rtol=0)


def test_every_lora_and_scale_makes_other_weights(tiny_sd_folder: Path, lora: Path) -> None:
    made = [AdaptedUNet("unet", lora), AdaptedUNet("unet", lora, 0.5)]
    digests = [weights_sha256(tiny_sd_folder, one) for one in (*made, "unet")]
    save_lora(tiny_sd_folder, lora, seed=1)
    assert len({*digests, weights_sha256(tiny_sd_folder, made[0])}) == 4


def test_one_unet_with_two_loras_is_two(tiny_sd_folder: Path, tmp_path: Path) -> None:
    files = [save_lora(tiny_sd_folder, tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    candidates = [Candidate(f"with-{file.stem}", str(tiny_sd_folder), 2, "lcm", 1.0, lora=str(file)) for file in files]
    together = draw(candidates)
    for latents, one in zip(together, candidates, strict=True):
        torch.testing.assert_close(latents, draw([one])[0], atol=1e-5, rtol=0)
    assert not torch.allclose(*together, atol=1e-2)


def test_the_cache_may_forget_all_that_it_holds(tiny_sd_folder: Path, lora: Path, own_cache: Path) -> None:
    """DeepCache's graphs are exported when they are first needed, from weights that lie outside the cache."""
    executor = Executor(device="cpu", fall_back=False)
    plain = Candidate("one", str(tiny_sd_folder), 3, "ddim", 1.0, lora=str(lora), engine="onnxruntime")
    draw([plain], executor=executor)
    EngineCache(own_cache).prune(0)
    draw([dataclasses.replace(plain, options={"deepcache_interval": 2})], executor=executor)


def test_a_catalog_finds_its_lora(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    save_lora(folder / "model", folder / "style.safetensors")
    candidate = Candidate("styled", "model", 2, "lcm", 1.0, lora="style.safetensors", lora_scale=0.5)
    catalog = dataclasses.replace(Catalog.load(folder, verify=False), candidates=(candidate,)).save(folder)
    assert Catalog.load(folder, verify=False).candidates == (candidate,)
    moved = Catalog.load(folder, verify=False).save(tmp_path / "elsewhere")
    assert moved.candidates[0].lora == str(folder / "style.safetensors")
    executor = Executor(device="cpu", resolve_model=catalog.resolve_model, resolve_lora=catalog.resolve_lora)
    [latents] = draw([candidate], executor=executor)
    assert torch.isfinite(latents).all()
    (folder / "styles").mkdir()
    (folder / "style.safetensors").rename(folder / "styles" / "pytorch_lora_weights.safetensors")
    assert catalog.resolve_lora("styles") == folder / "styles" / "pytorch_lora_weights.safetensors"
    with pytest.raises(FileNotFoundError, match=r"lora is 'style\.safetensors', but .* is not a file"):
        Catalog.load(folder, verify=False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("styles/none.safetensors", id="a path of two parts is no hub id"),
        pytest.param("model/unet/none.safetensors", id="nor is one in a folder that exists"),
        pytest.param("model/vae", id="a folder without a LoRA"),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tiny_catalog: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a file; accepted: a \.safetensors file"):
        Catalog.load(tiny_catalog).resolve_lora(name)


def test_a_lora_of_the_hub_is_one_file(tiny_catalog: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(lora)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    catalog = Catalog.load(tiny_catalog)
    for _ in range(2):
        assert catalog.resolve_lora("owner/lcm") == catalog.resolve_lora("owner/many/four/steps.safetensors") == lora
    assert asked == [("owner/lcm", "pytorch_lora_weights.safetensors"), ("owner/many", "four/steps.safetensors")]


def test_two_loras_of_one_file_name_have_a_quantization_each(tiny_catalog: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_catalog, tmp_path / "catalog")
    candidates = []
    for seed, name in enumerate(("lcm", "pixel")):
        (folder / name).mkdir()
        save_lora(folder / "model", folder / name / "pytorch_lora_weights.safetensors", seed=seed)
        candidates.append(Candidate(name, "model", 2, "lcm", 1.0, lora=name))
    dataclasses.replace(Catalog.load(folder, verify=False), candidates=tuple(candidates)).save(folder)
    arguments = ["quantize", folder, "--candidate", "lcm", "--candidate", "pixel", "--number", 2, "--rows", 8]
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    catalog = Catalog.load(folder, verify=False)
    made = [catalog.candidate("lcm-int8"), catalog.candidate("pixel-int8")]
    assert len({one.quantization for one in made}) == 2
    executor = Executor(device="cpu", resolve_model=catalog.resolve_model, resolve_lora=catalog.resolve_lora)
    for one in made:
        executor.prepare(one)


def of_another_unet(file: Path) -> None:
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name.replace("up_blocks.0", "up_blocks.7"): w for name, w in weights.items()}, file)


def of_another_width(file: Path) -> None:
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: torch.cat([w, w], 1) for name, w in weights.items() if "attn2" in name}, file)


def with_a_text_encoder(file: Path) -> None:
    weights = safetensors.torch.load_file(file)
    weights["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    safetensors.torch.save_file(weights, file)


def of_kohyas_dora(file: Path) -> None:
    weights = safetensors.torch.load_file(kohya(file))
    name = next(iter(weights)).split(".")[0]
    safetensors.torch.save_file({**weights, f"{name}.dora_scale": torch.ones(1)}, file)


def with_nan(file: Path) -> None:
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: w * float("nan") for name, w in weights.items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(of_another_unet, "added to the weights of UNet 'unet': .*LoRA made for", id="layers it lacks"),
        pytest.param(of_another_width, "can't be added", id="shapes of another UNet"),
        pytest.param(with_nan, "can't be added", id="NaN"),
        pytest.param(with_a_text_encoder, "also changes a text encoder", id="text encoder"),
        pytest.param(lambda file: file.write_bytes(b"x" * 40), "not a whole safetensors file", id="damaged"),
        pytest.param(of_kohyas_dora, "is DoRA as kohya has it", id="kohya's DoRA"),
        pytest.param(
            lambda file: safetensors.torch.save_file({"weight": torch.zeros(1)}, file), "has no LoRA weights", id="none"
        ),
    ],
)
def test_what_is_wrong_with_a_lora_is_told(
    tiny_sd_folder: Path, lora: Path, damage: Callable[[Path], None], message: str, own_cache: Path
) -> None:
    damage(lora)
    with pytest.raises(ValueError, match=message):
        draw([Candidate("one", str(tiny_sd_folder), 1, "lcm", 1.0, lora=str(lora))])
    assert not own_cache.exists() or not EngineCache(own_cache).entries()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        pytest.param("lora.bin", ValueError, r"accepted: a \.safetensors file", id="a pickle"),
        pytest.param("none.safetensors", FileNotFoundError, "is no file", id="no file"),
    ],
)
def test_files_are_checked_before_a_weight_is_read(
    tiny_sd_folder: Path, lora: Path, name: str, error: type[Exception], message: str
) -> None:
    (lora.parent / "lora.bin").write_bytes(b"")
    with pytest.raises(error, match=message):
        Executor(device="cpu").check(Candidate("one", str(tiny_sd_folder), 1, "lcm", 1.0, lora=str(lora.parent / name)))


@pytest.mark.parametrize("scale", [11.0, float("nan")])
def test_scales_are_checked(scale: float) -> None:
    with pytest.raises(ValueError, match="lora_scale"):
        Candidate("one", "model", 1, "lcm", 1.0, lora="lora.safetensors", lora_scale=scale)
    with pytest.raises(ValueError, match=r"lora_scale is 0\.5 without lora"):
        Candidate("one", "model", 1, "lcm", 1.0, lora_scale=0.5)


def test_without_peft_the_remedy_is_told(tiny_sd_folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catimage_accel.lora.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs peft.*`pip install 'catimage-accel\[lora\]'`"):
        Executor(device="cpu").check(Candidate("one", str(tiny_sd_folder), 1, "lcm", 1.0, lora=str(lora)))


def test_diffusers_says_nothing_while_it_fuses(
    tiny_sd_folder: Path, lora: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_unet(tiny_sd_folder, AdaptedUNet("unet", lora), torch.bfloat16)
    assert capfd.readouterr() == ("", "")
