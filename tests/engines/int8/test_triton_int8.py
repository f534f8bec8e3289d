"""The INT8 engine against fake quantization: layer by layer tightly, end to end by the error against float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from int8_unets import KEPT, PROMPTS, denoised, noise, relative_error, with_fake_unet

from catimage_accel.engines import DeepFeatures, EagerEngine, Engine
from catimage_accel.engines.int8.layers import Int8Conv2d, Int8Linear
from catimage_accel.engines.int8.swap import swap_layers
from catimage_accel.engines.triton_int8 import TritonInt8Engine
from catimage_accel.quantize.layers import quantizable_layers
from catimage_accel.quantize.quantization import LayerQuantization, Quantization


def test_keeps_the_protocol(engine: TritonInt8Engine) -> None:
    assert isinstance(engine, Engine)
    assert (engine.channels, engine.sample_size, engine.scale_factor) == (4, (16, 16), 4)
    assert (engine.name, engine.precisions, engine.dtype) == ("triton", ("int8",), torch.float32)
    assert engine.decode(noise(1)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("outputs", "smooth", "separate_heads"),
    [
        pytest.param(False, False, False, id="inputs and weights"),
        pytest.param(True, False, False, id="outputs too"),
        pytest.param(False, True, False, id="SmoothQuant, one factor an input"),
        pytest.param(False, True, True, id="SmoothQuant, q, k and v each their own"),
    ],
)
def test_is_the_fake_quantized_unet_but_for_ties(
    tiny_sd_folder: Path, saved: Callable[..., Path], eager: EagerEngine, outputs: bool, smooth: bool,
    separate_heads: bool,
) -> None:  # fmt: skip
    folder = saved(outputs=outputs, smooth=smooth, separate_heads=separate_heads)
    ours = denoised(TritonInt8Engine(tiny_sd_folder, quantization=folder))
    fake = denoised(with_fake_unet(tiny_sd_folder, folder))
    exact = denoised(eager)
    quantizing = relative_error(fake, exact)
    assert 1e-3 < quantizing < 0.2, "quantization shows"
    # Ties that fall the other way move ties in all layers after them: as errors, the two are alike; blocks, which
    # follow, are alike themselves.
    assert relative_error(ours, fake) < quantizing
    assert abs(relative_error(ours, exact) / quantizing - 1) < 0.1


def test_every_layer_is_accounted_for(engine: TritonInt8Engine, eager: EagerEngine) -> None:
    choices = {choice.name: choice for choice in engine.layers}
    assert set(choices) == set(quantizable_layers(EagerEngine(eager.shared.model).unet))
    kept = {name: choice.reason for name, choice in choices.items() if choice.precision != "int8"}
    assert kept == KEPT
    assert {choice.precision for choice in engine.layers} == {"int8", "fp32"}
    modules = dict(engine.unet.named_modules())
    for name, choice in choices.items():
        assert isinstance(modules[name], (Int8Conv2d, Int8Linear)) == (choice.precision == "int8")


def test_a_picture_does_not_depend_on_its_batch(engine: TritonInt8Engine) -> None:
    together, alone = denoised(engine, 2), []
    for row in range(2):
        text = engine.gather(engine.encode_prompts([PROMPTS[row]]))
        alone.append(engine.denoise(noise(2)[row : row + 1], torch.tensor([[901.0, 13.0][row]]), text))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_deepcache_at_a_refresh_is_the_whole_unet(engine: TritonInt8Engine) -> None:
    torch.testing.assert_close(denoised(engine, deep=DeepFeatures()), denoised(engine), atol=1e-5, rtol=1e-5)


def test_scales_that_do_not_fit_are_refused(tiny_sd_folder: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    good = Quantization.load(saved())
    name = "down_blocks.1.resnets.0.conv1"
    wrong = replace(good.layers[name], weight_amax=torch.ones(3))
    replace(good, layers={**good.layers, name: wrong}).save(tmp_path / "channels")
    with pytest.raises(ValueError, match=rf"layer '{name}': weight_amax has 3 values; accepted: 32"):
        TritonInt8Engine(tiny_sd_folder, quantization=tmp_path / "channels")
    other = LayerQuantization(torch.ones(3), torch.tensor(1.0))
    replace(good, layers={**good.layers, "nothing": other}).save(tmp_path / "name")
    with pytest.raises(ValueError, match="the UNet has no Conv2d or Linear 'nothing'"):
        TritonInt8Engine(tiny_sd_folder, quantization=tmp_path / "name")
    replace(good, format="fp8").save(tmp_path / "format")
    with pytest.raises(ValueError, match=r"holds 'fp8' scales; accepted with engine 'triton': 'int8'"):
        TritonInt8Engine(tiny_sd_folder, quantization=tmp_path / "format")
    replace(good, source_sha256="0" * 64).save(tmp_path / "source")
    with pytest.raises(ValueError, match="make it again with `catimage quantize`"):
        TritonInt8Engine(tiny_sd_folder, quantization=tmp_path / "source")


def test_precision_and_quantization_are_needed(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization is None; accepted with engine 'triton'"):
        TritonInt8Engine(tiny_sd_folder)
    with pytest.raises(ValueError, match=r"precision is 'fp16' with engine 'triton'; accepted: 'int8'"):
        TritonInt8Engine(tiny_sd_folder, precision="fp16", quantization=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"quantization\.json is missing"):
        TritonInt8Engine(tiny_sd_folder, quantization=tmp_path)


def test_shared_parts_are_shared(tiny_sd_folder: Path, saved: Callable[..., Path], eager: EagerEngine) -> None:
    engine = TritonInt8Engine(tiny_sd_folder, shared=eager.shared, quantization=saved())
    assert engine.shared is eager.shared
    [one], [other] = engine.encode_prompts(["a dog"]), eager.encode_prompts(["a dog"])
    assert one.hidden is other.hidden, "the text encoder ran once"


@pytest.mark.slow
def test_compiles_whole(tiny_sd_folder: Path, saved: Callable[..., Path]) -> None:
    """The UNet without the engine's cache of texts: torch.compile sees every kernel and breaks nowhere."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet").eval().requires_grad_(False)
    device = torch.device("cpu")
    swap_layers(unet, Quantization.load(saved(outputs=True)), "fp32", lambda: None, device)
    inputs = (noise(2), torch.tensor([901.0, 13.0]), torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs, return_dict=False)[0], unet(*inputs, return_dict=False)[0])
