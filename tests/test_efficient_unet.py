"""A UNet with blocks left out or repeated: what it predicts, saves, loads, and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import catimage_accel as ca
from catimage_accel.efficient_unet import EfficientUNet, removable_blocks, repeatable_blocks, with_repeats
from catimage_accel.engines import LoadedEngines
from catimage_accel.engines.cache import EngineCache

CPU = torch.device("cpu")


def sd15_shaped() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 24, 32, 32), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip


def small() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ).eval()  # fmt: skip


@torch.no_grad()
def predicted(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return unet(sample, torch.tensor([5, 900]), text, return_dict=False)[0]


@pytest.mark.parametrize("make", [small, sd15_shaped], ids=["two stages", "Stable Diffusion 1.5's shape"])
def test_without_changes_it_is_the_plain_unet(make) -> None:
    unet = make()
    assert torch.equal(predicted(with_repeats(unet, {})), predicted(unet))


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    unet, ran = sd15_shaped(), []
    for path in repeatable_blocks(unet):
        unet.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    predicted(unet)
    assert ran == repeatable_blocks(unet)
    # Every attention, and every ResNet but those that change the channels, a skip connection not counted.
    changing = {"down_blocks.1.resnets.0", "down_blocks.2.resnets.0", "up_blocks.2.resnets.0", "up_blocks.3.resnets.0"}
    changing -= set() if unet.config.block_out_channels[2] != unet.config.block_out_channels[1] else changing
    assert set(repeatable_blocks(unet)) - set(removable_blocks(unet)) == changing


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_runs_and_comes_back_from_disk(data, tmp_path_factory: pytest.TempPathFactory) -> None:
    unet = small()
    removable = removable_blocks(unet)
    repeats = data.draw(st.dictionaries(st.sampled_from(repeatable_blocks(unet)), st.integers(0, 3), max_size=6))
    repeats = {path: copies for path, copies in repeats.items() if copies or path in removable}
    made = with_repeats(unet, repeats)
    for path, copies in repeats.items():
        weights = [name for name in made.state_dict() if name.startswith(f"{path}.")]
        assert bool(weights) == (copies > 0)
    folder = tmp_path_factory.mktemp("unet")
    made.save_pretrained(folder)
    loaded = EfficientUNet.from_pretrained(folder).eval()
    assert loaded.config.block_repeats == {path: copies for path, copies in repeats.items() if copies != 1}
    assert torch.equal(predicted(loaded), predicted(made))
    # What is added changes nothing until it is trained.
    assert torch.equal(predicted(made), predicted(with_repeats(unet, {p: min(c, 1) for p, c in repeats.items()})))


def test_an_attention_left_out_is_one_that_adds_nothing() -> None:
    unet = small()
    silent = with_repeats(unet, {})
    for layer in (silent.up_blocks[0].attentions[0].proj_out,):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(predicted(with_repeats(unet, {"up_blocks.0.attentions.0": 0})), predicted(silent))


def test_changes_add_up() -> None:
    unet = small()
    first = with_repeats(unet, {"mid_block.attentions.0": 0, "up_blocks.1.resnets.1": 2})
    torch.nn.init.normal_(first.up_blocks[1].resnets[1].blocks[1].conv2.weight)
    second = with_repeats(first, {"up_blocks.1.resnets.1": 3, "mid_block.resnets.0": 0})
    assert second.config.block_repeats == {
        "mid_block.attentions.0": 0, "mid_block.resnets.0": 0, "up_blocks.1.resnets.1": 3,
    }  # fmt: skip
    assert torch.equal(predicted(second), predicted(with_repeats(first, {"mid_block.resnets.0": 0})))


@pytest.mark.parametrize(
    ("repeats", "told"),
    [
        ({"mid_block.resnets.7": 0}, r"'mid_block\.resnets\.7'; accepted: down_blocks\.0\.resnets\.0, "),
        ({"mid_block.resnets.0": -1}, r"-1 for mid_block\.resnets\.0; accepted: a whole number from 0 to 8"),
        ({"mid_block.resnets.0": 9}, "accepted: a whole number from 0 to 8"),
        ({"mid_block.resnets.0": "2"}, "'2' for mid_block.*accepted: a whole number from 0 to 8"),
        ({"down_blocks.1.resnets.0": 0}, r"down_blocks\.1\.resnets\.0, which makes 32 channels of 16; accepted: down"),
    ],
    ids=["no such block", "negative", "too many", "not a number", "it changes the channels"],
)
def test_what_can_t_be_is_refused(repeats: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        with_repeats(small(), repeats)


def test_a_block_that_was_left_out_can_t_come_back_without_weights() -> None:
    thin = with_repeats(small(), {"mid_block.resnets.1": 0})
    with pytest.raises(ValueError, match=r"'mid_block\.resnets\.1', which was left out before"):
        with_repeats(thin, {"mid_block.resnets.1": 1})


@pytest.fixture(scope="module")
def thin_folder(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with an efficient UNet, saved by diffusers."""
    folder = tmp_path_factory.mktemp("thin")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    repeats = {"mid_block.attentions.0": 0, "up_blocks.1.resnets.1": 0, "down_blocks.1.attentions.0": 2}
    pipe.unet = with_repeats(pipe.unet, repeats)
    pipe.register_modules(unet=pipe.unet)
    pipe.save_pretrained(folder)
    return folder


def drawn(pipe: StableDiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a dog", num_inference_steps=2, generator=generator, output_type="np").images)


def test_diffusers_own_pipeline_loads_the_folder_and_the_kernels_go_in_and_out(thin_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(thin_folder, safety_checker=None)
    assert isinstance(pipe.unet, ca.EfficientUNet)
    before = drawn(pipe)
    ca.accelerate(pipe)
    torch.testing.assert_close(drawn(pipe), before, rtol=1e-4, atol=1e-4)
    ca.restore(pipe)
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_every_engine_predicts_what_the_network_does(thin_folder: Path, tmp_path: Path, engine: str) -> None:
    unet = EfficientUNet.from_pretrained(thin_folder, subfolder="unet").eval()
    loaded = LoadedEngines(CPU, EngineCache(tmp_path), fall_back=False).get(thin_folder, "unet", (engine,))
    text = loaded.gather(loaded.encode_prompts(["a dog", "two cats"]))
    sample, timestep = torch.randn(2, 4, 16, 16), torch.tensor([4.0, 800.0])
    with torch.no_grad():
        expected = unet(sample, timestep, text.hidden, return_dict=False)[0]
    torch.testing.assert_close(loaded.denoise(sample, timestep, text), expected, rtol=1e-3, atol=1e-4)
