"""A quantization on disk: what comes back, what is refused, and when it is no longer the UNet's."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from catimage_accel.quantize import LayerQuantization, Quantization, check_checkpoint, weights_sha256


def layer(**changed: Any) -> LayerQuantization:
    values = {"weight_amax": torch.tensor([1.0, 0.5]), "input_amax": torch.tensor(2.0), **changed}
    return LayerQuantization(**values)


def quantization(**changed: Any) -> Quantization:
    full = layer(output_amax=torch.tensor(3.0), input_scale=torch.tensor([1.0, 2.0, 0.25]))
    values: dict[str, Any] = {
        "format": "int8", "recipe": "int8-smoothquant", "layers": {"conv_in": layer(), "block.0.to_q": full},
        "kept": {"conv_out": "sensitive: 20% of all layers' errors"}, "source_sha256": "a" * 64,
        "calibration": {"prompts": 3, "candidates": ["one"]}, "errors": {"conv_in": 1e-3, "conv_out": 0.1},
    }  # fmt: skip
    return Quantization(**{**values, **changed})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = quantization()
    saved.save(tmp_path / "new")
    loaded = Quantization.load(tmp_path / "new")
    assert loaded.digest == saved.digest
    for name in ("format", "recipe", "kept", "source_sha256", "calibration", "errors"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.layers.keys() == saved.layers.keys()
    for name, scales in saved.layers.items():
        found = loaded.layers[name].tensors()
        assert found.keys() == scales.tensors().keys()
        assert all(torch.equal(found[kind], value) for kind, value in scales.tensors().items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["quantization.json", "scales.safetensors"]


@pytest.mark.parametrize("changed", [
    pytest.param({"format": "fp8"}, id="other number format"),
    pytest.param({"source_sha256": "b" * 64}, id="other weights"),
    pytest.param({"layers": {"conv_in": layer()}}, id="a layer less"),
    pytest.param({"layers": {**quantization().layers, "conv_in": layer(input_amax=torch.tensor(2.1))}}, id="a scale"),
    pytest.param({"layers": {**quantization().layers, "conv_in": layer(output_amax=torch.tensor(3.0))}}, id="output"),
])  # fmt: skip
def test_digest_changes_with_what_changes_results(changed: dict[str, Any]) -> None:
    assert quantization(**changed).digest != quantization().digest


def test_digest_ignores_what_does_not_change_results() -> None:
    backwards = dict(reversed(quantization().layers.items()))
    told = replace(quantization(), kept={}, errors={}, calibration={}, layers=backwards)
    assert told.digest == quantization().digest


@pytest.mark.parametrize(("values", "said"), [
    pytest.param({"input_amax": torch.tensor(0.0)}, "input_amax has the value 0", id="zero divides"),
    pytest.param({"weight_amax": torch.tensor([1.0, float("nan")])}, "weight_amax has the value nan", id="NaN"),
    pytest.param({"output_amax": torch.tensor(float("inf"))}, "output_amax has the value inf", id="infinity"),
    pytest.param({"input_amax": torch.tensor([1.0])}, r"input_amax is torch.float32 \(1,\)", id="axes"),
    pytest.param({"weight_amax": torch.ones(2, dtype=torch.float16)}, "torch.float16", id="half precision"),
    pytest.param({"input_amax": None}, "input_amax is None", id="missing"),
])  # fmt: skip
def test_scales_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layer(**values)


def spoil_scales(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes scales and the checksum that guards them."""
    from quantize_parts import edit_json

    path = folder / "scales.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    edit_json(folder / "quantization.json", scales_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(("spoil", "said"), [
    pytest.param(lambda folder: cut(folder / "quantization.json"), "not valid JSON", id="half of the JSON"),
    pytest.param(lambda folder: cut(folder / "scales.safetensors"), "SHA-256 differs", id="half of the scales"),
    pytest.param(
        lambda folder: spoil_scales(folder, lambda t: t.update({"conv_in.input_amax": torch.tensor(-1.0)})),
        "conv_in: input_amax has the value -1", id="a negative scale",
    ),
    pytest.param(
        lambda folder: spoil_scales(folder, lambda t: t.pop("conv_in.input_amax")), "input_amax", id="a scale missing"
    ),
    pytest.param(
        lambda folder: spoil_scales(folder, lambda t: t.update({"conv_in.zero": torch.ones(1)})), "zero", id="unknown"
    ),
])  # fmt: skip
def test_changed_files_are_refused_in_one_line(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    quantization().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said) as raised:
        Quantization.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("values", "said"), [
    ({"version": 2}, "version is 2"), ({"format": "int4"}, "format is 'int4'"), ({"bits": 8}, "no such key"),
    ({"errors": {"conv_in": -1.0}}, "errors.conv_in is -1.0"),
])  # fmt: skip
def test_unknown_descriptions_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    from quantize_parts import edit_json

    quantization().save(tmp_path)
    edit_json(tmp_path / "quantization.json", **values)
    with pytest.raises(ValueError, match=said):
        Quantization.load(tmp_path)


@pytest.mark.parametrize("name", ["quantization.json", "scales.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    quantization().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Quantization.load(tmp_path)


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"max_shard_size": "200KB"}], ids=["plain", "fp16", "shards"])
def test_weights_digest_follows_the_weights(tiny_sd_folder: Path, tmp_path: Path, how: dict[str, str]) -> None:
    model = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    model.save_pretrained(tmp_path / "unet", **how)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) == 1 or "max_shard_size" in how
    made_from = weights_sha256(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    quantization(source_sha256=made_from).check_source(tmp_path / "copy")
    model.conv_out.bias.data[0] += 1e-6
    model.save_pretrained(tmp_path / "unet", **how)
    with pytest.raises(ValueError, match="catimage quantize"):
        quantization(source_sha256=made_from).check_source(tmp_path)


def test_weights_digest_needs_safetensors(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        weights_sha256(tmp_path)


def test_checkpoints_quantized_before_are_refused(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from quantize_parts import edit_json

    check_checkpoint(tiny_sd_folder)
    shutil.copytree(tiny_sd_folder / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.int8)
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ValueError, match=r"conv_in\.weight is I8; accepted"):
        check_checkpoint(tmp_path)
    edit_json(tmp_path / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="quantization_config"):
        check_checkpoint(tmp_path)
