"""A UNet with blocks left out or repeated: what it predicts, saves, loads, and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import catimage_accel as ca
from catimage_accel.efficient_unet import EfficientUNet, removable_blocks, repeatable_blocks, with_repeats
from catimage_accel.engines import DeepFeatures, EagerEngine, LoadedEngines
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.loading import load_unet
from catimage_accel.profiling import count_flops

CPU = torch.device("cpu")


def sd15_shaped() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 24, 32, 32), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip


def small(**config: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 32, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(shape | config)).eval()


def sdxl_shaped() -> UNet2DConditionModel:
    return small(
        block_out_channels=(16, 32, 32), layers_per_block=2, transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip


def zoo_shaped() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(Path(ca.__file__).parent / "zoo" / "emoji" / "model" / "unet")
    return UNet2DConditionModel.from_config(config).eval()


SHAPES = pytest.mark.parametrize(
    "make", [small, sd15_shaped, sdxl_shaped, zoo_shaped],
    ids=["two stages", "Stable Diffusion 1.5's shape", "SDXL's shape", "the zoo's"],
)  # fmt: skip


@torch.no_grad()
def predicted(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, unet.config.in_channels, 16, 16, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.full((2, 6), 16.0)}
    return unet(sample, torch.tensor([5, 900]), text, added_cond_kwargs=added, return_dict=False)[0]


@SHAPES
def test_without_changes_it_is_the_plain_unet(make) -> None:
    unet = make()
    same = with_repeats(unet, dict.fromkeys(repeatable_blocks(unet), 1))
    assert same.config.block_repeats == {}
    assert torch.equal(predicted(same), predicted(unet))


@SHAPES
def test_of_any_shape_blocks_are_doubled_at_no_change_and_left_out_all_at_once(make) -> None:
    unet = make()
    assert torch.equal(predicted(with_repeats(unet, dict.fromkeys(repeatable_blocks(unet), 2))), predicted(unet))
    thinnest = with_repeats(unet, dict.fromkeys(removable_blocks(unet), 0))
    assert removable_blocks(thinnest) == []
    assert predicted(thinnest).shape == predicted(unet).shape


@pytest.mark.parametrize(
    "config",
    [{"act_fn": "gelu"}, {"resnet_out_scale_factor": 1.5, "mid_block_scale_factor": 2.0},
     {"resnet_time_scale_shift": "scale_shift"}, {"mid_block_type": "UNetMidBlock2D"}, {"mid_block_type": None}],
    ids=["another activation", "scaled outputs", "scale and shift", "no attention in the middle", "no middle"],
)  # fmt: skip
def test_copies_are_built_as_the_block_is(config: dict[str, object]) -> None:
    unet = small(**config)
    doubled = with_repeats(unet, dict.fromkeys(repeatable_blocks(unet), 2))
    assert torch.equal(predicted(doubled), predicted(unet))
    first, second = doubled.up_blocks[0].resnets[0].blocks
    assert type(second.nonlinearity) is type(first.nonlinearity)


def test_other_kinds_of_blocks_run_once() -> None:
    unet = small(
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
    )
    attentions = [path for path in repeatable_blocks(unet) if ".attentions." in path]
    assert attentions == ["mid_block.attentions.0"]


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    unet, ran = sd15_shaped(), []
    for path in repeatable_blocks(unet):
        unet.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    predicted(unet)
    assert ran == repeatable_blocks(unet)
    # Every attention, and every ResNet but those that change the channels, a skip connection not counted.
    changing = {"down_blocks.1.resnets.0", "down_blocks.2.resnets.0", "up_blocks.2.resnets.0", "up_blocks.3.resnets.0"}
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


def test_there_can_be_fewer_copies_again() -> None:
    unet = small()
    three = with_repeats(unet, {"up_blocks.0.resnets.0": 3, "mid_block.attentions.0": 2})
    for name, parameter in three.named_parameters():
        if ".blocks." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    two = with_repeats(three, {"up_blocks.0.resnets.0": 2})
    kept, whole = two.state_dict(), three.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in kept.items())
    assert set(whole) - set(kept) == {name for name in whole if name.startswith("up_blocks.0.resnets.0.blocks.2.")}
    one = with_repeats(two, {"up_blocks.0.resnets.0": 1, "mid_block.attentions.0": 1})
    assert one.config.block_repeats == {}
    assert set(one.state_dict()) == set(unet.state_dict())
    first = three.up_blocks[0].resnets[0].blocks[0].state_dict()
    assert all(torch.equal(value, first[name]) for name, value in one.up_blocks[0].resnets[0].state_dict().items())


def test_what_can_be_left_out_of_a_thin_network_is_what_is_left() -> None:
    unet = small()
    thin = with_repeats(unet, {"up_blocks.0.resnets.0": 0, "mid_block.attentions.0": 0, "mid_block.resnets.1": 2})
    gone = {"up_blocks.0.resnets.0", "mid_block.attentions.0"}
    assert removable_blocks(thin) == [path for path in removable_blocks(unet) if path not in gone]
    assert repeatable_blocks(thin) == [path for path in repeatable_blocks(unet) if path not in gone]
    assert torch.equal(predicted(with_repeats(thin, dict.fromkeys(gone, 0))), predicted(thin))


def test_dtype_and_mode_are_kept() -> None:
    made = with_repeats(small().bfloat16().train(), {"mid_block.resnets.0": 2})
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert made.training


@pytest.mark.parametrize(
    ("repeats", "told"),
    [
        ({"mid_block.resnets.7": 0}, r"'mid_block\.resnets\.7'; accepted: down_blocks\.0\.resnets\.0, "),
        ({"mid_block.resnets.7": 1}, r"'mid_block\.resnets\.7'; accepted: down_blocks\.0\.resnets\.0, "),
        ({"mid_block.resnets.0": True}, r"True for mid_block\.resnets\.0; accepted: a whole number from 0 to 8"),
        ({"mid_block.resnets.0": -1}, r"-1 for mid_block\.resnets\.0; accepted: a whole number from 0 to 8"),
        ({"mid_block.resnets.0": 9}, "accepted: a whole number from 0 to 8"),
        ({"mid_block.resnets.0": "2"}, "'2' for mid_block.*accepted: a whole number from 0 to 8"),
        ({"down_blocks.1.resnets.0": 0}, r"down_blocks\.1\.resnets\.0, which makes 32 channels of 16; accepted: down"),
    ],
    ids=[
        "no such block", "no such block, once", "a bool", "negative", "too many", "not a number",
        "it changes the channels",
    ],
)  # fmt: skip
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
    assert pipe.unet.conv_norm_out.activation == "silu"  # as in a plain UNet
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
    deep = DeepFeatures()
    for refresh in (None, ()):
        deep.refresh = refresh
        found = loaded.denoise(sample, timestep, text, deep=deep)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_flops_are_those_of_the_blocks_that_run(thin_folder: Path, tiny_sd_folder: Path, tiny_catalog: Path) -> None:
    folders = {"thin": thin_folder, "whole": tiny_sd_folder}
    candidates = tuple(ca.Candidate(name, str(folder), 2, "ddim", 1.0) for name, folder in folders.items())
    flops = count_flops(dataclasses.replace(ca.Catalog.load(tiny_catalog), candidates=candidates))
    assert flops["thin"] < flops["whole"]


def test_a_class_that_is_not_known_is_told(thin_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(thin_folder, tmp_path / "other")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet3DConditionModel"}))
    told = r"unet/config\.json: the class is 'UNet3DConditionModel'; accepted: UNet2DConditionModel, EfficientUNet"
    with pytest.raises(ValueError, match=told):
        EagerEngine(folder)
    with pytest.raises(ValueError, match=r"the class is 'UNet3DConditionModel'; accepted: .*EfficientUNet"):
        load_unet(folder, "unet", torch.float32)
