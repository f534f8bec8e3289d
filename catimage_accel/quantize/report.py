"""A UNet quantized from start to end, and the report that says what became of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from catimage_accel.quantize.calibrate import calibrate
from catimage_accel.quantize.inputs import UNetInputs
from catimage_accel.quantize.layers import multiply_adds
from catimage_accel.quantize.quantization import Quantization
from catimage_accel.quantize.recipes import find_recipe
from catimage_accel.quantize.sensitivity import keep_sensitive, layer_errors, output_error

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerReport", "QuantizationReport", "quantize_unet"]

HELD_OUT = 4  # Every so many rows are kept from calibration, to measure on.
SENSITIVITY_ROWS = 16
ROWS_TOGETHER = 8


@dataclass(frozen=True)
class LayerReport:
    """One layer: ``precision`` is "int8", "fp8" or "high"; ``share`` its part of the UNet's multiply-adds, 0 to 1.

    ``error`` is the relative squared error of the UNet's output when only this layer is quantized, None where that was
    not measured; ``why`` says why it stays in high precision.
    """

    name: str
    kind: str
    precision: str
    share: float
    error: float | None
    why: str | None


@dataclass(frozen=True)
class QuantizationReport:
    """What became of every layer. ``output_error`` is the relative squared error of the quantized UNet's output, and
    ``calibrated_error`` the one before sensitive layers were taken out, both on ``held_out_rows`` that nothing was
    calibrated on; ``quantized_share`` the share of the UNet's multiply-adds in quantized layers, 0 to 1.
    """

    recipe: str
    digest: str
    percentile: float
    outputs: bool
    budget: float
    calibration_rows: int
    held_out_rows: int
    quantized_share: float
    output_error: float
    calibrated_error: float
    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)

    def table(self, title: str) -> Table:
        """The layers in high precision first, then the others, largest errors first."""
        from rich.table import Table

        table = Table(title=title)
        for heading in ("layer", "kind", "precision", "multiply-adds", "error", "why"):
            table.add_column(heading, justify="right" if heading in ("multiply-adds", "error") else "left")
        for layer in sorted(self.layers, key=lambda layer: (layer.why is None, -(layer.error or 0))):
            error = "-" if layer.error is None else f"{layer.error:.1e}"
            table.add_row(layer.name, layer.kind, layer.precision, f"{layer.share:.2%}", error, layer.why or "")
        return table


def quantize_unet(
    unet: Any,
    inputs: UNetInputs,
    recipe: str = "int8",
    *,
    source_sha256: str,
    percentile: float | None = None,
    outputs: bool = True,
    budget: float = 0.05,
    calibration: Mapping[str, Any] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Quantization, QuantizationReport]:
    """Calibrates on three of four rows of ``inputs``, keeps what is sensitive, and measures on the other rows.

    ``percentile`` None is the recipe's. ``advance`` is told how many of how many parts of the work are done. See
    :func:`~.calibrate.calibrate` and :func:`~.sensitivity.keep_sensitive` for the arguments and what is raised.
    """
    if len(inputs) < HELD_OUT:
        raise ValueError(f"inputs has {len(inputs)} rows; accepted: {HELD_OUT} or more, some of them to measure on")
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget}; accepted: 0 to 1, the share of multiply-adds in high precision")
    percentile = find_recipe(recipe).percentile if percentile is None else percentile
    held_out = inputs.rows(slice(HELD_OUT - 1, None, HELD_OUT)).batches(ROWS_TOGETHER)
    seen = inputs.rows([row for row in range(len(inputs)) if row % HELD_OUT != HELD_OUT - 1])
    some = seen.rows(slice(None, None, max(1, len(seen) // SENSITIVITY_ROWS))).batches(ROWS_TOGETHER)
    batches = seen.batches(ROWS_TOGETHER)
    counts, total = multiply_adds(unet, inputs)
    parts = len(batches) * (1 if percentile == 100 else 2) + len(counts)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        advance(done, parts)

    everything = calibrate(
        unet, recipe, batches, source_sha256=source_sha256, percentile=percentile, outputs=outputs,
        calibration=calibration, advance=step,
    )  # fmt: skip
    errors = layer_errors(unet, everything, some, step)
    quantization = keep_sensitive(everything, errors, counts, total, budget)
    layers = tuple(
        LayerReport(
            name, type(unet.get_submodule(name)).__name__,
            quantization.format if name in quantization.layers else "high", counts.get(name, 0) / total,
            errors.get(name), quantization.kept.get(name),
        )
        for name, _ in unet.named_modules() if name in counts or name in quantization.kept
    )  # fmt: skip
    return quantization, QuantizationReport(
        recipe, quantization.digest, percentile, outputs, budget, len(seen), sum(map(len, held_out)),
        sum(layer.share for layer in layers if layer.why is None), output_error(unet, quantization, held_out),
        output_error(unet, everything, held_out), layers,
    )  # fmt: skip
