"""A VAE with a narrower decoder: pruned, saved, loaded, decoded with by every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

import catimage_accel as ca
from catimage_accel.efficient_decoder import EfficientDecoderKL
from catimage_accel.engines import LoadedEngines
from catimage_accel.engines.cache import EngineCache
from catimage_accel.snapfusion.pruning import pruned_decoder

SD15 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


def parameters(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def sd15_shaped() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**SD15, "block_out_channels": (16, 32, 32, 64)}, norm_num_groups=8, sample_size=32).eval()


def test_at_full_scale_it_has_a_quarter_of_the_weights() -> None:
    with torch.device("meta"):
        whole = AutoencoderKL(**SD15)
        half = EfficientDecoderKL(decoder_block_out_channels=(64, 128, 256, 256), decoder_norm_num_groups=32, **SD15)
    assert parameters(whole.decoder) == pytest.approx(49.5, abs=0.1)
    assert parameters(half.decoder) == pytest.approx(13, rel=0.05)
    assert parameters(half.encoder) == parameters(whole.encoder)


@torch.no_grad()
def test_pruned_of_nothing_it_is_the_whole_decoder() -> None:
    """With mid attention, stages that keep the number of channels and stages that do not."""
    vae, latents = sd15_shaped(), torch.randn(2, 4, 4, 4)
    kept = pruned_decoder(vae, 1.0)
    assert torch.equal(kept.decode(latents).sample, vae.decode(latents).sample)


@torch.no_grad()
def test_channels_that_nothing_writes_are_the_ones_to_go() -> None:
    """A narrow decoder's weights spread over a wide one whose other channels are silent: pruning finds them again."""
    torch.manual_seed(1)
    narrow = {**SD15, "block_out_channels": (8, 16, 16, 32), "layers_per_block": 1}
    wide = {**narrow, "block_out_channels": (16, 32, 32, 64)}
    small = AutoencoderKL(**narrow, norm_num_groups=8, mid_block_add_attention=False).eval()
    large = AutoencoderKL(**wide, norm_num_groups=8, mid_block_add_attention=False).eval()
    for name, value in large.decoder.state_dict().items():
        kept = small.decoder.state_dict()[name]
        value.zero_()
        # every second channel, along each axis that was widened
        value[tuple(slice(1, None, 2) if w != n else slice(None)
                    for w, n in zip(value.shape, kept.shape, strict=True))] = kept  # fmt: skip
    found = pruned_decoder(large, 0.5)
    for name, value in found.decoder.state_dict().items():
        assert torch.equal(value, small.decoder.state_dict()[name]), name


@torch.no_grad()
def test_the_encoder_is_whole_and_all_comes_back_from_disk(tmp_path: Path) -> None:
    vae, pictures = sd15_shaped(), torch.randn(1, 3, 32, 32)
    half = pruned_decoder(vae, 0.5)
    assert half.config.decoder_block_out_channels == (8, 16, 16, 32)
    assert torch.equal(half.encode(pictures).latent_dist.mean, vae.encode(pictures).latent_dist.mean)
    half.save_pretrained(tmp_path)
    loaded = EfficientDecoderKL.from_pretrained(tmp_path).eval()
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(loaded.decode(latents).sample, half.decode(latents).sample)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"decoder_block_out_channels": (8, 16)}, r"is \(8, 16\); accepted: 4 of them"),
        ({"decoder_block_out_channels": (8, 16, 16, 30)}, "accepted: multiples of decoder_norm_num_groups, 8"),
    ],
    ids=["too few", "groups do not divide"],
)
def test_channels_that_can_t_be_are_refused(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EfficientDecoderKL(**change, **{**SD15, "block_out_channels": (16, 32, 32, 64)}, norm_num_groups=8)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, 0.01, float("nan")])
def test_a_share_that_can_t_be_kept_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep is .*accepted: "):
        pruned_decoder(sd15_shaped(), keep)


@pytest.fixture(scope="module")
def narrow_folder(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    pipe.register_modules(vae=pruned_decoder(pipe.vae, 0.5))
    pipe.save_pretrained(folder)
    return folder


def test_diffusers_own_pipeline_loads_the_folder(narrow_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(narrow_folder, safety_checker=None)
    assert isinstance(pipe.vae, ca.EfficientDecoderKL)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a dog", num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_every_engine_decodes_as_the_decoder_does(narrow_folder: Path, tmp_path: Path, engine: str) -> None:
    vae = EfficientDecoderKL.from_pretrained(narrow_folder, subfolder="vae").eval()
    loaded = LoadedEngines(torch.device("cpu"), EngineCache(tmp_path), fall_back=False).get(
        narrow_folder, "unet", (engine,)
    )
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(loaded.decode(latents), expected, rtol=1e-3, atol=1e-4)
