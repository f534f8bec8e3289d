"""What it takes to build the built-in catalog's engines with TensorRT-RTX (TensorRT, where there is a CUDA device).

    python bench/engines/build_zoo.py [--rows 2 --rows 8]

Both UNets in float32, float16 and INT8 (quantized here with ModelOpt, from a few prompts), DeepCache's graphs and the
decoder, each built from nothing, one after the other: seconds, sizes, and how many of an engine's convolutions and
matrix products have INT8 inputs and weights, as the builder tells. TensorRT-RTX builds without a CUDA device and
finishes on one, so nothing here says how fast an engine runs; for it NVIDIA promises INT8 for the weights of matrix
products alone. Results go to ``bench/results/cpu/`` (or the device's), or to the folder that OUT names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkout import map_package

map_package()

import torch  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402

from catimage_accel.calibration import record_inputs  # noqa: E402
from catimage_accel.catalog import Catalog  # noqa: E402
from catimage_accel.engines.cache import EngineCache  # noqa: E402
from catimage_accel.engines.components import Component  # noqa: E402
from catimage_accel.engines.loading import load_unet  # noqa: E402
from catimage_accel.engines.onnx_export import MODEL_FILE, export  # noqa: E402
from catimage_accel.engines.planning import shape_profile  # noqa: E402
from catimage_accel.engines.tensorrt import RUNTIMES, TensorRTRuntime  # noqa: E402
from catimage_accel.engines.tensorrt.layers import LayerTable  # noqa: E402
from catimage_accel.quantize import calibrate, weights_sha256  # noqa: E402

CANDIDATES = {"unet": "teacher-ddim-25", "unet_small": "small-ddim-25"}
PROMPTS = (
    "a dog", "a crown, a dog and a bear on a pink background", "three lemons", "a castle left of a rocket",
    "two bees and a star", "a cat under a tree", "a red car", "an octopus and a cake on a green background",
)  # fmt: skip
CALIBRATION_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="batch sizes; 2 and 8 if absent")
    options = parser.parse_args()
    rows = sorted(set(options.rows or (2, 8)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = RUNTIMES["tensorrt" if RUNTIMES["tensorrt"].why_not(device) is None else "tensorrt-rtx"]
    print(f"{runtime.name} {runtime.version()}, batches of {' and '.join(map(str, rows))}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cache = EngineCache(Path(folder) / "engines")
        for component in components(Path(folder)):
            results.append(measured(runtime, component, rows, cache, device))
            print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    facts = about(device, torch.float32)
    facts |= {"engine": runtime.name, "engine_version": runtime.version(), "calibration_rows": CALIBRATION_ROWS}
    path = result_file("engines", device, facts["date"])
    save(path, facts, results)
    show(results)
    print(f"written to {path}")


def components(folder: Path) -> Iterator[Component]:
    """What is built, the quantizations among them made in ``folder``."""
    catalog = Catalog.load("emoji", verify=False)
    model = catalog.resolve_model(catalog.candidate(CANDIDATES["unet"]).model)
    for unet, candidate in CANDIDATES.items():
        yield Component(model, "unet", unet, "fp32")
        yield Component(model, "unet", unet, "fp16")
        yield Component(model, "unet", unet, "int8", quantized(catalog, candidate, model, unet, folder / unet))
    yield Component(model, "unet-deep", "unet", "fp16")
    yield Component(model, "unet-shallow", "unet", "fp16")
    yield Component(model, "vae_decoder", "unet", "fp32")


def quantized(catalog: Catalog, candidate: str, model: Path, unet: str, folder: Path) -> Path:
    """All layers in INT8, their outputs too, from what ``PROMPTS`` give the UNet."""

    inputs = record_inputs(
        catalog.candidate(candidate), PROMPTS, CALIBRATION_ROWS, device="cpu", resolve_model=catalog.resolve_model
    )
    loaded = load_unet(model, unet, torch.float32)
    calibrate(loaded, "int8", inputs.batches(), source_sha256=weights_sha256(model, unet)).save(folder)
    return folder


def measured(
    runtime: TensorRTRuntime, component: Component, rows: list[int], cache: EngineCache, device: torch.device
) -> dict[str, Any]:
    """One engine, built from nothing."""
    start = time.perf_counter()
    onnx = export(component, cache, high_precision="fp16")
    exported = time.perf_counter() - start
    profile = shape_profile(component.model, component.unet, rows)
    start = time.process_time()
    [entry] = runtime.runner(component, profile, cache, device).build()
    busy = time.process_time() - start
    table = LayerTable.load(entry.folder)
    assert table is not None
    return {
        "component": component.name, "part": component.part, "precision": component.precision,
        "export_seconds": round(exported, 2), "build_seconds": round(entry.build_seconds, 2),
        "build_cpu_seconds": round(busy, 2),
        "onnx_bytes": (onnx.folder / MODEL_FILE).stat().st_size, "engine_bytes": entry.bytes,
        "layers": len(table.multiplying()), "int8_layers": len(table.multiplying("INT8")),
        "int8_weights": len(table.quantized_weights), "int8_weight_elements": sum(table.quantized_weights.values()),
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    columns = ("component", "precision", "export s", "build s", "CPU s", "ONNX MB", "engine MB", "INT8", "INT8 weights")
    lines = [
        (
            f"{row['component']} ({row['part']})", row["precision"], f"{row['export_seconds']:.1f}",
            f"{row['build_seconds']:.1f}", f"{row['build_cpu_seconds']:.1f}", f"{row['onnx_bytes'] / 1e6:.1f}",
            f"{row['engine_bytes'] / 1e6:.1f}", f"{row['int8_layers']} of {row['layers']}", str(row["int8_weights"]),
        )
        for row in results
    ]  # fmt: skip
    print_table("INT8: convolutions and matrix products of INT8 inputs and weights", columns, lines)


if __name__ == "__main__":
    main()
