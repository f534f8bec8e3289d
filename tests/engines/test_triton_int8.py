"""The INT8 engine against fake quantization: layer by layer tightly, end to end by the error against float32."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from catimage_accel.engines import DeepFeatures, EagerEngine, Engine
from catimage_accel.engines.int8.layers import Int8Conv2d, Int8Linear, why_not_int8
from catimage_accel.engines.int8.swap import swap_layers
from catimage_accel.engines.triton_int8 import TritonInt8Engine
from catimage_accel.kernels import tuning
from catimage_accel.quantize.fake import fake_layer
from catimage_accel.quantize.layers import quantizable_layers
from catimage_accel.quantize.quantization import LayerQuantization, Quantization, weights_sha256

KEPT = {"conv_in": "first convolution", "conv_out": "last convolution"}
PROMPTS = ["a dog", ""]


def noise(rows: int, side: int = 16) -> Tensor:
    return torch.randn((rows, 4, side, side), generator=torch.Generator().manual_seed(rows))


def denoised(engine: EagerEngine, rows: int = 2, deep: DeepFeatures | None = None) -> Tensor:
    text = engine.gather(engine.encode_prompts(PROMPTS[:rows]))
    return engine.denoise(noise(rows), torch.tensor([901.0, 13.0][:rows]), text, deep=deep)


def measured_layers(
    engine: EagerEngine, *, outputs: bool, smooth: bool, separate_heads: bool
) -> dict[str, LayerQuantization]:
    """Scales from what the layers see of real inputs: largest absolute values, as calibration by maximum has it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: layer for name, layer in quantizable_layers(engine.unet).items() if name not in KEPT}

    def see(name: str) -> Callable[..., None]:
        return lambda _, arguments, y: seen.__setitem__(name, (arguments[0].detach(), y.detach()))

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in layers.items():
        x, y = seen[name]
        factors = None
        if smooth and isinstance(layer, nn.Linear):
            # The same for projections that share an input, or each its own, as SmoothQuant's would be.
            own = generator if separate_heads else torch.Generator().manual_seed(layer.in_features)
            factors = 0.5 + torch.rand(layer.in_features, generator=own)
            x = x * factors
        weight = layer.weight if factors is None else layer.weight / factors
        found[name] = LayerQuantization(
            weight.flatten(1).abs().amax(1).float(), x.abs().max().float() * 0.9,  # some inputs saturate
            y.abs().max().float() if outputs else None, factors,
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def eager(tiny_sd_folder: Path) -> EagerEngine:
    return EagerEngine(tiny_sd_folder)


@pytest.fixture(scope="module")
def saved(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(outputs=, smooth=, separate_heads=)``: a folder with the quantization of the tiny UNet."""
    folders: dict[tuple[bool, ...], Path] = {}

    def save(outputs: bool = False, smooth: bool = False, separate_heads: bool = False) -> Path:
        key = (outputs, smooth, separate_heads)
        if key not in folders:
            layers = measured_layers(
                EagerEngine(tiny_sd_folder), outputs=outputs, smooth=smooth, separate_heads=separate_heads
            )
            folders[key] = tmp_path_factory.mktemp("quantized")
            Quantization("int8", "int8", layers, KEPT, weights_sha256(tiny_sd_folder)).save(folders[key])
        return folders[key]

    return save


@pytest.fixture(scope="module")
def engine(tiny_sd_folder: Path, saved: Callable[..., Path]) -> TritonInt8Engine:
    return TritonInt8Engine(tiny_sd_folder, quantization=saved())


def with_fake_unet(folder: Path, quantization: Path) -> EagerEngine:
    """The eager engine over the UNet that rounds in floating point."""
    engine = EagerEngine(folder)
    for name, scales in Quantization.load(quantization).layers.items():
        parent, _, own = name.rpartition(".")
        layer = engine.unet.get_submodule(name)
        setattr(engine.unet.get_submodule(parent), own, fake_layer(name, layer, scales, "int8"))
    return engine


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


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


BLOCKS = (ResnetBlock2D, Transformer2DModel)


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "SmoothQuant"])
@pytest.mark.parametrize("outputs", [False, True], ids=["floating-point results", "rounded results"])
def test_each_block_is_its_fake_quantized_one_but_for_ties(
    tiny_sd_folder: Path, saved: Callable[..., Path], outputs: bool, smooth: bool
) -> None:
    """With what quantizes its inputs, on the inputs that it has in the fake UNet: nothing cascades."""
    folder = saved(outputs=outputs, smooth=smooth)
    fake, ours = with_fake_unet(tiny_sd_folder, folder), TritonInt8Engine(tiny_sd_folder, quantization=folder)
    plain, ties = EagerEngine(tiny_sd_folder), []
    for engine in (plain, ours):
        engine._text.current = fake.gather(fake.encode_prompts(PROMPTS))
    calls: dict[str, Any] = {}
    for name, block in fake.unet.named_modules():
        if isinstance(block, BLOCKS):
            block.register_forward_hook(
                lambda _, x, named, y, name=name: calls.__setitem__(name, (x, named, y)), with_kwargs=True
            )
    denoised(fake)
    assert len(calls) == 12
    with torch.inference_mode():
        for name, (x, named, wanted) in calls.items():
            found, exact = (engine.unet.get_submodule(name)(*x, **named) for engine in (ours, plain))
            wanted, found, exact = (y[0] if isinstance(y, tuple) else y for y in (wanted, found, exact))
            ties.append(relative_error(found, wanted) / relative_error(wanted, exact))
    assert max(ties) < 0.1


def layer_inputs(engine: EagerEngine) -> dict[str, Tensor]:
    """What each Conv2d and Linear sees in a denoising step."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].detach()))
        for name, layer in quantizable_layers(engine.unet).items()
    ]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "SmoothQuant"])
@pytest.mark.parametrize("outputs", [False, True], ids=["floating-point result", "rounded result"])
def test_each_layer_is_its_fake_quantized_one(
    tiny_sd_folder: Path, saved: Callable[..., Path], smooth: bool, outputs: bool
) -> None:
    """Sums are exact here and float32 there: what is left is float32's, and a level where the result is rounded."""
    plain = EagerEngine(tiny_sd_folder)
    scales = Quantization.load(saved(outputs=outputs, smooth=smooth)).layers
    for name, x in layer_inputs(plain).items():
        if name in KEPT:
            continue
        module = plain.unet.get_submodule(name)
        kind: Any = Int8Conv2d if isinstance(module, nn.Conv2d) else Int8Linear
        ours, fake = kind(module, scales[name])(x), fake_layer(name, module, scales[name], "int8")(x)
        difference = (ours - fake).abs()
        close = difference <= 1e-5 * fake.abs().max()
        if outputs:
            amax = scales[name].output_amax
            assert amax is not None
            assert difference.max() <= 1.001 * amax / 127
            assert (~close).float().mean() < 0.01
        else:
            assert close.all(), name


def test_every_layer_is_accounted_for(engine: TritonInt8Engine, eager: EagerEngine) -> None:
    choices = {choice.name: choice for choice in engine.layers}
    assert set(choices) == set(quantizable_layers(EagerEngine(eager.shared.model).unet))
    kept = {name: choice.reason for name, choice in choices.items() if choice.precision != "int8"}
    assert kept == KEPT
    assert {choice.precision for choice in engine.layers} == {"int8", "fp32"}
    modules = dict(engine.unet.named_modules())
    for name, choice in choices.items():
        assert isinstance(modules[name], (Int8Conv2d, Int8Linear)) == (choice.precision == "int8")


def test_norms_quantize_for_the_layers_that_read_them(engine: TritonInt8Engine, saved: Callable[..., Path]) -> None:
    block = "down_blocks.1.resnets.0"
    transformer = "down_blocks.1.attentions.0"
    inner = f"{transformer}.transformer_blocks.0"
    reasons = {choice.name: choice.reason for choice in engine.layers}
    for layer, source in {
        f"{block}.conv1": f"{block}.norm1", f"{block}.conv2": f"{block}.norm2",
        f"{transformer}.proj_in": f"{transformer}.norm", f"{inner}.attn1.to_q": f"{inner}.norm1",
        f"{inner}.attn1.to_k": f"{inner}.norm1", f"{inner}.attn1.to_v": f"{inner}.norm1",
        f"{inner}.attn2.to_q": f"{inner}.norm2", f"{inner}.ff.net.0.proj": f"{inner}.norm3",
        f"{inner}.ff.net.2": f"{inner}.ff.net.0",
    }.items():  # fmt: skip
        assert reasons[layer] == f"its input is quantized by {source}"
    own = "its input is quantized by a kernel of its own"
    for layer in (f"{block}.conv_shortcut", f"{block}.time_emb_proj", f"{inner}.attn1.to_out.0", f"{inner}.attn2.to_k"):
        assert reasons[layer] == own
    seen: dict[str, torch.dtype] = {}
    hooks = [
        module.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].dtype))
        for name, module in engine.unet.named_modules()
        if isinstance(module, (Int8Conv2d, Int8Linear))
    ]
    denoised(engine)
    for hook in hooks:
        hook.remove()
    assert {name for name, dtype in seen.items() if dtype != torch.int8} == {n for n in seen if reasons[n] == own}


def test_projections_with_other_scales_quantize_for_themselves(
    tiny_sd_folder: Path, saved: Callable[..., Path]
) -> None:
    folder = saved(smooth=True, separate_heads=True)
    reasons = {c.name: c.reason for c in TritonInt8Engine(tiny_sd_folder, quantization=folder).layers}
    inner = "down_blocks.1.attentions.0.transformer_blocks.0"
    for name in ("to_q", "to_k", "to_v"):
        assert reasons[f"{inner}.attn1.{name}"] == "its input is quantized by a kernel of its own"
    assert reasons[f"{inner}.attn2.to_q"] == f"its input is quantized by {inner}.norm2"
    assert reasons[f"{inner}.ff.net.2"] == "its input is quantized by a kernel of its own"


def test_a_picture_does_not_depend_on_its_batch(engine: TritonInt8Engine) -> None:
    together, alone = denoised(engine, 2), []
    for row in range(2):
        text = engine.gather(engine.encode_prompts([PROMPTS[row]]))
        alone.append(engine.denoise(noise(2)[row : row + 1], torch.tensor([[901.0, 13.0][row]]), text))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_deepcache_at_a_refresh_is_the_whole_unet(engine: TritonInt8Engine) -> None:
    torch.testing.assert_close(denoised(engine, deep=DeepFeatures()), denoised(engine), atol=1e-5, rtol=1e-5)


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Writes what was measured of an op on the device "chip", which every device is."""
    defaults = {path.name: path.read_text() for path in tuning.FOLDER.glob("*.default.json")}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "device_slug", lambda device: "chip")
    for name, text in defaults.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name.replace("default", "chip")).write_text(text)
    tuning.forget()

    def write(op: str, entries: Any) -> None:
        (tmp_path / f"{op}.chip.json").write_text(json.dumps(entries))
        tuning.forget()

    yield write
    tuning.forget()


def test_layers_that_were_measured_to_be_slower_stay_as_they_are(
    tiny_sd_folder: Path, saved: Callable[..., Path], chip: Callable[[str, Any], None]
) -> None:
    """Linear layers win where results are wider; the two sizes of batch count alike."""
    config = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    shapes = [(64, 0.5), (256, 1.6)]
    chip("int8_linear", [
        {"shape": {"aligned": 2, "rows": 128, "out_features": out}, "config": config, "speedup": speedup}
        for out, speedup in shapes
    ])  # fmt: skip
    engine = TritonInt8Engine(tiny_sd_folder, quantization=saved())
    choices = {choice.name: choice for choice in engine.layers}
    inner = "down_blocks.1.attentions.0.transformer_blocks.0"
    slow, fast = choices[f"{inner}.attn1.to_q"], choices[f"{inner}.ff.net.0.proj"]
    assert (slow.precision, slow.speedup) == ("fp32", pytest.approx(0.5))
    assert slow.reason == "INT8 was measured to take 2.00 times as long at this size"
    assert type(engine.unet.get_submodule(slow.name)) is nn.Linear
    assert (fast.precision, fast.speedup) == ("int8", pytest.approx(1.6))
    assert choices["down_blocks.1.resnets.0.conv1"].precision == "int8"
    assert engine.encode_prompts([""])[0].prompt == ""
    assert denoised(engine).isfinite().all()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), r"groups 2"),
        (nn.Conv2d(8, 8, 3, dilation=2), r"dilation is \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Conv2d(8, 8, 3, padding=(1, 0)), r"padding is \(1, 0\)"),
        (nn.Conv2d(8, 8, 3, stride=(1, 2)), r"stride \(1, 2\)"),
        (nn.Conv2d(8, 8, 3, padding="same"), "padding is 'same'"),
        (nn.ConvTranspose2d(8, 8, 3), "it is a ConvTranspose2d"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_layers_without_a_kernel_say_so(layer: nn.Module, reason: str) -> None:
    assert re.search(reason, why_not_int8(layer) or "")
    assert why_not_int8(nn.Conv2d(8, 8, 3, padding=1)) is None


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
