"""Scales read out of ModelOpt: our UNet rounds as ModelOpt's own does, and what can't be calibrated is said."""

from __future__ import annotations

import builtins
import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantize_parts import load_unet, random_inputs
from torch import Tensor, nn

from catimage_accel.quantize import LayerQuantization, Quantization, UNetInputs, calibrate, fake_quantized
from catimage_accel.quantize.calibrate import modelopt_quantized
from catimage_accel.quantize.fake import quantize_dequantize
from catimage_accel.quantize.layers import check_weights, quantizable_layers
from catimage_accel.quantize.recipes import RECIPES

BATCHES = random_inputs(8).batches(4)
SOURCE = "a" * 64


def calibrated_here(unet: Any, recipe: str = "int8", **options: Any) -> Quantization:
    return calibrate(unet, recipe, BATCHES, source_sha256=SOURCE, **options)


def layer_inputs(unet: Any, inputs: UNetInputs) -> dict[str, Tensor]:
    """Layer -> what it is given."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].clone()}))
        for name, layer in quantizable_layers(unet).items()
    ]
    inputs.through(unet)
    for handle in handles:
        handle.remove()
    return seen


def off_edges(x: Tensor, scales: LayerQuantization, format: str) -> Tensor:
    """``x`` moved away from the edges between two steps, where a difference in the last bit decides."""
    smooth = 1.0 if scales.input_scale is None else scales.input_scale
    rounded = quantize_dequantize(x * smooth, float(scales.input_amax), format)
    moved = rounded * 1.02 if format == "fp8" else rounded + 0.3 * scales.input_amax / 127
    return moved / smooth


def on_edge(weight: Tensor, scales: LayerQuantization) -> Tensor:
    """The output channels with a weight so near to the edge between two steps that the last bit decides."""
    smooth = 1.0 if scales.input_scale is None else scales.input_scale.double()
    place = (weight.double() / smooth).flatten(1) * 127 / scales.weight_amax.double()[:, None]
    edges = ((place - place.floor()) - 0.5).abs() < 1e-4
    assert edges.any(1).float().mean() < 0.2
    return edges.any(1)


@pytest.mark.parametrize(("recipe", "percentile", "outputs"), [
    pytest.param("int8", 100.0, True, id="int8 as it comes, outputs too"),
    pytest.param("int8", 99.0, False, id="int8 clipped"),
    pytest.param("int8-smoothquant", 100.0, False, id="smoothed"),
    pytest.param("int8-smoothquant", 99.0, True, id="smoothed, then clipped"),
    pytest.param("fp8", 100.0, True, id="fp8"),
])  # fmt: skip
def test_layers_round_as_modelopts(unet: Any, recipe: str, percentile: float, outputs: bool) -> None:
    options: dict[str, Any] = {"percentile": percentile, "outputs": outputs}
    quantization = calibrated_here(unet, recipe, **options)
    ours = fake_quantized(unet, quantization)
    theirs, _ = modelopt_quantized(unet, RECIPES[recipe], BATCHES, **options)
    given = layer_inputs(unet, random_inputs(3, seed=5))
    assert len(given) == 83
    for name, x in given.items():
        scales = quantization.layers[name]
        x = off_edges(x, scales, quantization.format)
        with torch.no_grad():
            found, expected = ours.get_submodule(name)(x), theirs.get_submodule(name)(x)
        wrong = (found - expected).abs() > 1e-5 * expected.abs().max()
        if quantization.format == "int8":
            wrong = wrong.movedim(1 if x.ndim == 4 else -1, 0)[~on_edge(unet.get_submodule(name).weight, scales)]
        if scales.output_amax is None:
            assert not wrong.any(), name
        else:  # sums can't be kept off the edges between output steps
            assert wrong.float().mean() < 2e-3, name
    inputs = random_inputs(4, seed=6)
    plain = inputs.through(unet)
    own, reference = (inputs.through(one) - plain for one in (ours, theirs))
    assert 0.9 < own.square().mean() / reference.square().mean() < 1.1


def test_every_conv_and_linear_is_quantized_and_nothing_else(unet: Any) -> None:
    before = {name: (id(module), copy.deepcopy(module.state_dict())) for name, module in unet.named_modules()}
    quantization = calibrated_here(unet)
    assert quantization.layers.keys() == quantizable_layers(unet).keys()
    assert any("proj_out" in name for name in quantization.layers)  # ModelOpt's patterns leave it out
    assert quantization.kept == {}
    assert all(scales.output_amax is not None for scales in quantization.layers.values())
    for name, module in unet.named_modules():
        identity, state = before[name]
        assert id(module) == identity
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_scales_are_the_largest_values_seen(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    tops = [layer_inputs(unet, batch) for batch in BATCHES]
    for name, scales in calibrated("int8", outputs=False).layers.items():
        torch.testing.assert_close(scales.input_amax, max(top[name].abs().max() for top in tops), rtol=1e-4, atol=1e-6)
        weight = unet.get_submodule(name).weight
        torch.testing.assert_close(scales.weight_amax, weight.abs().flatten(1).amax(1))
        assert scales.output_amax is None


@pytest.mark.parametrize("percentile", [99.9, 90.0])
def test_percentile_is_that_of_the_absolute_inputs(unet: Any, percentile: float) -> None:
    batches = [layer_inputs(unet, batch) for batch in BATCHES]
    clipped, whole = calibrated_here(unet, percentile=percentile), calibrated_here(unet)
    for name, scales in clipped.layers.items():
        values = torch.cat([batch[name].abs().flatten() for batch in batches]).double()
        top, width = whole.layers[name].input_amax, whole.layers[name].input_amax / 1000
        assert scales.input_amax <= top
        assert (values > scales.input_amax + width).double().mean() <= 1 - percentile / 100, name
        assert (values >= scales.input_amax - width).double().mean() >= 1 - percentile / 100, name


def test_fp8_has_one_scale_a_weight(calibrated: Callable[..., Quantization]) -> None:
    for scales in calibrated("fp8").layers.values():
        assert len(scales.weight_amax.unique()) == 1


def test_smoothing_is_of_linear_layers(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    for name, scales in calibrated("int8-smoothquant").layers.items():
        assert (scales.input_scale is not None) == isinstance(unet.get_submodule(name), nn.Linear)


def test_kept_layers_are_left_out_of_calibration(unet: Any) -> None:
    quantization = calibrated_here(unet, kept={"conv_out": "I say so"})
    assert quantization.kept == {"conv_out": "I say so"}
    assert "conv_out" not in quantization.layers
    with pytest.raises(ValueError, match="kept names 'conv_auto'"):
        calibrated_here(unet, kept={"conv_auto": "a typo"})


def test_layers_that_have_no_scale_stay_and_are_named(unet: Any) -> None:
    norm = unet.up_blocks[0].resnets[0].norm2
    norm.weight.data.zero_()
    norm.bias.data.zero_()
    unet.up_blocks[1].resnets[0].conv1 = nn.ConvTranspose2d(48, 16, 3, padding=1).requires_grad_(False)
    quantization = calibrated_here(unet)
    assert quantization.kept == {
        "up_blocks.0.resnets.0.conv2": "its inputs or outputs were all zero in calibration",
        "up_blocks.1.resnets.0.conv1": "ConvTranspose2d; only plain Conv2d and Linear are quantized",
    }
    assert quantization.layers.keys() & quantization.kept.keys() == set()
    fake_quantized(unet, quantization)


def test_weights_of_zeros_stay_zero(unet: Any) -> None:
    unet.conv_out.weight.data[1] = 0
    unet.conv_out.bias.data[1] = 0
    quantized = fake_quantized(unet, calibrated_here(unet, outputs=False))
    assert (random_inputs(2).through(quantized)[:, 1] == 0).all()


def test_progress_is_told(unet: Any) -> None:
    for percentile, passes in ((100.0, 1), (99.0, 2)):
        told: list[None] = []
        calibrated_here(unet, percentile=percentile, advance=lambda told=told: told.append(None))
        assert len(told) == passes * len(BATCHES)


def test_modelopt_is_quiet(unet: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    calibrated_here(unet, "int8-smoothquant", percentile=99.0)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(("options", "said"), [
    pytest.param({"recipe": "int4"}, "recipe is 'int4'; accepted: int8, int8-smoothquant, fp8", id="recipe"),
    pytest.param({"percentile": 0.0}, "percentile is 0.0", id="clips everything"),
    pytest.param({"percentile": 100.5}, "percentile is 100.5", id="beyond all"),
    pytest.param({"batches": []}, "batches is empty", id="no inputs"),
    pytest.param(
        {"kept": dict.fromkeys(quantizable_layers(nn.Sequential(nn.Linear(1, 1))), "")}, "kept names '0'", id="other"
    ),
])  # fmt: skip
def test_bad_arguments(unet: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrate(unet, **{"recipe": "int8", "batches": BATCHES, "source_sha256": SOURCE, **options})


def all_kept(unet: Any) -> None:
    calibrate(unet, "int8", BATCHES, source_sha256=SOURCE, kept=dict.fromkeys(quantizable_layers(unet), "no"))


def overflow(unet: Any) -> None:
    unet.down_blocks[0].resnets[0].conv1.weight.data.fill_(3e38)
    calibrated_here(unet)


def not_a_number(unet: Any) -> None:
    unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    calibrated_here(unet)


def whole_numbers(unet: Any) -> None:
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.to(torch.int8), requires_grad=False)
    calibrated_here(unet)


def twice(unet: Any) -> None:
    calibrated_here(fake_quantized(unet, calibrated_here(unet)))


def by_modelopt_before(unet: Any) -> None:
    check_weights(modelopt_quantized(unet, RECIPES["int8"], BATCHES)[0])


@pytest.mark.parametrize(("attempt", "said"), [
    (all_kept, "every layer is kept"),
    (overflow, r"down_blocks\.0\.resnets\.0\.conv1' gives NaN or infinity"),
    (not_a_number, r"conv_in\.weight has NaN"),
    (whole_numbers, r"conv_in\.weight is int8"),
    (twice, "conv_in is a FakeQuantizedConv2d"),
    (by_modelopt_before, "is a Quant"),
])  # fmt: skip
def test_unets_that_cannot_be_quantized(unet: Any, attempt: Callable[[Any], None], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        attempt(unet)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [("sample", float("nan")), ("encoder_hidden_states", float("inf"))])
def test_inputs_that_are_not_finite(field: str, value: float) -> None:
    inputs = random_inputs(4)
    getattr(inputs, field)[2, 0, 0] = value
    with pytest.raises(ValueError, match=f"{field} has NaN or infinity in 1 of 4 rows"):
        inputs.rows([0, 2, 1, 3])


def test_without_modelopt_the_remedy_is_told(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "modelopt":
            raise ModuleNotFoundError("No module named 'modelopt'", name="modelopt")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'catimage-accel\[quantize\]'"):
        calibrated_here(unet)


def test_importing_the_package_does_not_import_modelopt() -> None:
    import subprocess

    code = "import catimage_accel.quantize, catimage_accel.cli, sys; print('modelopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_half_precision_weights_are_calibrated_in_float32(tiny_sd_folder: Any) -> None:
    whole, half = load_unet(tiny_sd_folder), load_unet(tiny_sd_folder).half()
    found, expected = calibrated_here(half, outputs=False), calibrated_here(whole, outputs=False)
    assert half.conv_in.weight.dtype == torch.float16
    for name, scales in expected.layers.items():
        torch.testing.assert_close(found.layers[name].weight_amax, scales.weight_amax, rtol=1e-3, atol=0)
