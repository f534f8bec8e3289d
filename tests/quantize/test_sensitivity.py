"""Which layers are worth an exception, and the report of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_parts import random_inputs
from rich.console import Console

from catimage_accel.quantize import (
    LayerQuantization,
    Quantization,
    keep_sensitive,
    layer_errors,
    output_error,
    quantize_unet,
)
from catimage_accel.quantize.layers import multiply_adds

BATCHES = random_inputs(4, seed=3).batches(2)


def only(quantization: Quantization, *names: str) -> Quantization:
    return replace(quantization, layers={name: quantization.layers[name] for name in names})


def test_error_is_that_of_one_layer_alone(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    names = ("conv_in", "mid_block.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
    before = [id(module) for module in unet.modules()]
    told: list[None] = []
    errors = layer_errors(unet, only(calibrated("int8", 99.9), *names), BATCHES, lambda: told.append(None))
    assert [id(module) for module in unet.modules()] == before
    assert len(told) == len(names)
    assert errors.keys() == set(names)
    for name in names:
        assert errors[name] == pytest.approx(output_error(unet, only(calibrated("int8", 99.9), name), BATCHES))
        assert 0 < errors[name] < output_error(unet, calibrated("int8", 99.9), BATCHES)


def test_unet_is_whole_again_after_a_failure(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    before = [id(module) for module in unet.modules()]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_errors(unet, calibrated(), BATCHES, stop)
    assert [id(module) for module in unet.modules()] == before


def test_a_layer_with_bad_scales_is_the_first_to_be_kept(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    bad = "up_blocks.1.resnets.1.conv_shortcut"
    scales = calibrated().layers[bad]
    spoilt = replace(scales, input_amax=scales.input_amax / 100)
    quantization = replace(calibrated(), layers={**calibrated().layers, bad: spoilt})
    errors = layer_errors(unet, quantization, BATCHES)
    counts, total = multiply_adds(unet, BATCHES[0])
    kept = keep_sensitive(quantization, errors, counts, total, 0.01)
    assert bad in kept.kept
    assert "sensitive" in kept.kept[bad]
    assert kept.errors == errors
    assert output_error(unet, kept, BATCHES) < 0.5 * output_error(unet, quantization, BATCHES)


layer = LayerQuantization(torch.ones(1), torch.tensor(1.0))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**9)), min_size=2, max_size=20),
    st.floats(0, 0.9), st.integers(1, 10**9),
)  # fmt: skip
def test_budget_is_kept_and_spent_on_the_worst(measured: list[tuple[float, int]], budget: float, others: int) -> None:
    errors = {f"layer{i}": error for i, (error, _) in enumerate(measured)}
    counts = {f"layer{i}": count for i, (_, count) in enumerate(measured)}
    total = sum(counts.values()) + others
    whole = Quantization("int8", "int8", dict.fromkeys(errors, layer), {"conv_in": "told"}, "a" * 64)
    small = {name for name, error in errors.items() if error == 0 or error < 1e-3 * sum(errors.values())}
    if budget > 0 and not small and sum(counts.values()) <= budget * total:
        with pytest.raises(ValueError, match="leaves no layer"):
            keep_sensitive(whole, errors, counts, total, budget)
        return
    found = keep_sensitive(whole, errors, counts, total, budget)
    kept = set(found.kept) - {"conv_in"}
    spent = sum(counts[name] for name in kept)
    assert spent <= budget * total
    assert kept | found.layers.keys() == errors.keys()
    assert not kept & found.layers.keys()
    assert found.kept["conv_in"] == "told"
    worth = {name: errors[name] / max(1, counts[name]) for name in errors}
    for name in found.layers if budget > 0 else ():
        worse = sum(counts[other] for other in kept if worth[other] >= worth[name])
        assert name in small or worse + counts[name] > budget * total
    assert not kept & small


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_layers_that_change_nothing_are_all_quantized_whatever_may_be_kept(budget: float) -> None:
    whole = Quantization("int8", "int8", {"conv_in": layer, "conv_out": layer}, {}, "a" * 64)
    counts = {"conv_in": 1, "conv_out": 0}
    assert keep_sensitive(whole, dict.fromkeys(counts, 0.0), counts, 10, budget).layers == whole.layers


def test_a_unet_that_gives_nothing_is_refused(unet: Any, calibrated: Callable[..., Quantization]) -> None:
    unet.conv_out.weight.data.zero_()
    unet.conv_out.bias.data.zero_()
    with pytest.raises(ValueError, match="output is zero"):
        layer_errors(unet, only(calibrated(), "conv_in"), BATCHES)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_budget_is_a_share(budget: float) -> None:
    whole = Quantization("int8", "int8", {"conv_in": layer}, {}, "a" * 64)
    with pytest.raises(ValueError, match="budget is"):
        keep_sensitive(whole, {"conv_in": 1.0}, {"conv_in": 1}, 10, budget)


def test_multiply_adds_are_counted_by_hand(unet: Any) -> None:
    counts, total = multiply_adds(unet, BATCHES[0])
    assert counts["conv_in"] == 16 * 16 * 16 * 4 * 9
    assert counts["time_embedding.linear_1"] == 16 * 64
    # 64 positions of 32 features, and 24 tokens.
    prefix = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert counts[f"{prefix}.attn1.to_q"] == 64 * 32 * 32
    assert counts[f"{prefix}.attn2.to_k"] == 24 * 32 * 32
    assert 0.8 * total < sum(counts.values()) < total  # the rest is attention


def test_report_tells_every_layer(unet: Any) -> None:
    told: list[tuple[int, int]] = []
    quantization, report = quantize_unet(
        unet, random_inputs(16), "int8", source_sha256="a" * 64, budget=0.1,
        calibration={"prompts": 2}, advance=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(done, 2 * 2 + 83) for done in range(1, 2 * 2 + 83 + 1)]
    assert report.digest == quantization.digest
    assert (report.calibration_rows, report.held_out_rows) == (12, 4)
    assert report.percentile == 99.999
    assert len(report.layers) == 83
    kept = {layer.name: layer for layer in report.layers if layer.why}
    assert kept.keys() == quantization.kept.keys()
    assert kept
    assert {layer.precision for layer in kept.values()} == {"high"}
    assert 0 < sum(layer.share for layer in kept.values()) <= 0.1
    assert report.quantized_share == pytest.approx(sum(layer.share for layer in report.layers if not layer.why))
    assert 0 < report.output_error < report.calibrated_error
    assert {layer.name: layer.error for layer in report.layers} == quantization.errors
    again = json.loads(json.dumps(report.as_dict()))
    assert again["layers"][0]["name"] == report.layers[0].name
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table("tiny"))
    shown = console.export_text()
    assert all(f" {layer.name} " in shown for layer in report.layers)


def test_too_few_inputs_are_refused(unet: Any) -> None:
    with pytest.raises(ValueError, match="inputs has 3 rows; accepted: 4 or more"):
        quantize_unet(unet, random_inputs(3), source_sha256="a" * 64)
