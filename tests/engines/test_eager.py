"""The eager engine against the diffusers modules that it runs."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from catimage_accel.engines import DeepFeatures, EagerEngine, Engine, LoadedEngines, SharedParts, check_model_folder


@pytest.fixture(scope="module")
def engine(tiny_sd_folder: Path) -> EagerEngine:
    return EagerEngine(tiny_sd_folder)


@pytest.fixture(scope="module")
def pipe(tiny_sd_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None, local_files_only=True)


def noise(rows: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn((rows, 4, height, width), generator=torch.Generator().manual_seed(rows))


def test_keeps_the_protocol(engine: EagerEngine) -> None:
    assert isinstance(engine, Engine)
    assert (engine.channels, engine.sample_size, engine.scale_factor) == (4, (16, 16), 4)
    assert (engine.dtype, engine.device) == (torch.float32, torch.device("cpu"))


def test_encodes_as_diffusers(engine: EagerEngine, pipe: StableDiffusionPipeline) -> None:
    prompts = ["a dog", "", "a dog", "three lemons"]
    states = engine.encode_prompts(prompts)
    expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    torch.testing.assert_close(torch.stack([state.hidden for state in states]), expected, atol=1e-5, rtol=1e-5)
    assert [state.prompt for state in states] == prompts
    assert states[0] is states[2], "computed once"
    assert engine.encode_prompts(["a dog"])[0] is states[0], "while in use"


def test_long_prompts_are_cut_with_a_warning(engine: EagerEngine) -> None:
    prompt = "a crown and " * 30 + "a zebra"
    with pytest.warns(UserWarning, match=r"cut off: 'a crown and .*\.\.\.' has .* only 24 are read") as caught:
        [state] = engine.encode_prompts([prompt])
    assert len(str(caught[0].message)) < 250
    with pytest.warns(UserWarning, match="only 24 are read"):
        [same] = engine.encode_prompts([prompt.replace("zebra", "crown")])
    torch.testing.assert_close(state.hidden, same.hidden)


def test_every_long_prompt_is_told_of_and_none_is_kept(engine: EagerEngine) -> None:
    eager = sys.modules[EagerEngine.__module__]
    before = dict(getattr(eager, "__warningregistry__", {}))
    prompts = [f"{number:02} crowns and " + "a crown and " * 30 for number in range(20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for prompt in prompts:
            engine.encode_prompts([prompt])
    assert sum("cut off" in str(one.message) for one in caught) == len(prompts)
    assert {str(key) for key in getattr(eager, "__warningregistry__", {})} <= {str(key) for key in before} | {"version"}


@pytest.mark.parametrize("deep", [None, DeepFeatures()], ids=["whole UNet", "DeepCache at a refresh of all rows"])
@pytest.mark.parametrize("size", [(16, 16), (13, 9)], ids=["trained size", "sizes that halving rounds"])
def test_denoises_rows_of_their_own_timesteps(
    engine: EagerEngine, pipe: StableDiffusionPipeline, deep: DeepFeatures | None, size: tuple[int, int]
) -> None:
    prompts, timesteps = ["", "a dog", "three lemons"], torch.tensor([999.0, 500.5, 1.0])
    sample = noise(3, *size)
    text = engine.gather(engine.encode_prompts(prompts))
    actual = engine.denoise(sample, timesteps, text, deep=None if deep is None else DeepFeatures())
    with torch.no_grad():
        hidden = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        expected = pipe.unet(sample, timesteps, hidden).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_held_features_need_a_first_step(engine: EagerEngine) -> None:
    text = engine.gather(engine.encode_prompts(["a dog", ""]))
    with pytest.raises(ValueError, match=r"deep\.features is None"):
        engine.denoise(noise(2), torch.tensor([9.0, 9.0]), text, deep=DeepFeatures(refresh=(0,)))


def test_decodes_as_diffusers(engine: EagerEngine, pipe: StableDiffusionPipeline) -> None:
    latents = noise(3)
    with torch.no_grad():
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(engine.decode(latents), expected, atol=1e-5, rtol=1e-4)


def test_bf16_runs_every_part_in_bf16_and_answers_in_float32(tiny_sd_folder: Path) -> None:
    engine = EagerEngine(tiny_sd_folder, precision="bf16")
    parts = (engine.unet, *engine.shared.text.encoders, engine.shared.vae())
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}
    text = engine.gather(engine.encode_prompts(["a dog"]))
    assert engine.denoise(noise(1), torch.tensor([500.0]), text).dtype == torch.float32
    assert engine.decode(noise(1)).dtype == torch.float32


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_float16_decoder_that_overflows_stays_in_float32(
    tiny_sd_folder: Path, tmp_path: Path, force_upcast: bool
) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "upcast")
    edit("vae", force_upcast=force_upcast)(folder)
    shared = SharedParts(folder, torch.float16, torch.device("cpu"))
    assert shared.text.encoders[0].dtype == torch.float16
    assert shared.vae().dtype == (torch.float32 if force_upcast else torch.float16)
    assert shared.decode(noise(1)).dtype == torch.float32


def test_shared_parts_of_another_precision_are_refused(tiny_sd_folder: Path, engine: EagerEngine) -> None:
    with pytest.raises(ValueError, match=r"shared is in torch\.float32 on cpu; accepted: torch\.bfloat16"):
        EagerEngine(tiny_sd_folder, precision="bf16", shared=engine.shared)


def test_engines_of_one_folder_share_text_encoder_and_decoder(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "two")
    shutil.copytree(folder / "unet", folder / "unet_small")
    cache = LoadedEngines(torch.device("cpu"))
    large, small = (cache.get(folder, unet) for unet in ("unet", "unet_small"))
    assert isinstance(large, EagerEngine)
    assert isinstance(small, EagerEngine)
    assert large.shared is small.shared
    assert large.unet is not small.unet
    assert cache.get(folder) is large
    [one], [other] = large.encode_prompts(["a dog"]), small.encode_prompts(["a dog"])
    assert one.hidden is other.hidden, "the text encoder ran once"


def test_weights_of_the_fp16_variant(tiny_sd_folder: Path, tmp_path: Path, engine: EagerEngine) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "variant")
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        module = kind.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, variant="fp16")
    other = EagerEngine(folder)
    for name, weight in engine.unet.state_dict().items():
        torch.testing.assert_close(other.unet.state_dict()[name], weight, atol=0, rtol=0)


def without_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def without_vocabulary(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def pickle_only(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def text_pickle_only(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


def edit(part: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(without_part, FileNotFoundError, r"vae/config\.json is missing", id="no VAE"),
        pytest.param(without_tokenizer, FileNotFoundError, "tokenizer is missing", id="no tokenizer"),
        pytest.param(without_vocabulary, FileNotFoundError, "tokenizer has no vocabulary", id="no vocabulary"),
        pytest.param(pickle_only, FileNotFoundError, "a pickle, which is never loaded", id="UNet is a pickle"),
        pytest.param(text_pickle_only, FileNotFoundError, r"pytorch_model\.bin, a pickle", id="text is a pickle"),
        pytest.param(edit("vae", _class_name="AutoencoderTiny"), ValueError, "'AutoencoderTiny'", id="VAE class"),
        pytest.param(edit("unet", time_cond_proj_dim=256), ValueError, "time_cond_proj_dim is 256", id="LCM"),
        pytest.param(edit("unet", in_channels=9), ValueError, r"are \(9, 4\); accepted: \(4, 4\)", id="inpainting"),
        pytest.param(edit("unet", num_class_embeds=10), ValueError, "UNets without class labels", id="class labels"),
        pytest.param(edit("unet", sample_size=None), ValueError, "sample_size is missing", id="no size"),
        pytest.param(
            lambda f: (f / "text_encoder_2").mkdir(), FileNotFoundError, "tokenizer_2 is missing", id="half of SDXL"
        ),
        pytest.param(lambda f: (f / "unet" / "config.json").write_text("{"), ValueError, "not JSON", id="JSON"),
    ],
)
def test_folders_are_checked_before_loading(
    tiny_sd_folder: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "damaged")
    damage(folder)
    for check in (check_model_folder, EagerEngine):
        with pytest.raises(error, match=message):
            check(folder)


def test_a_vocabulary_in_two_files_is_one(tiny_sd_folder: Path, tmp_path: Path, engine: EagerEngine) -> None:
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "two files")
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    [state] = EagerEngine(folder).encode_prompts(["three lemons"])
    [expected] = engine.encode_prompts(["three lemons"])
    torch.testing.assert_close(state.hidden, expected.hidden)
