"""OpenVINO on the CPU: one compiled model for every batch size, shapes fixed, and one for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catimage_accel.engines.cache import CacheEntry, EngineCache, EngineKey
from catimage_accel.engines.cache_entry import read_record
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.machine import device_key, int8_weight_bits, os_key
from catimage_accel.engines.onnx_export import FORMAT, MODEL_FILE, export
from catimage_accel.engines.openvino_time import EMBEDDED, time_alone, without_time
from catimage_accel.engines.protocol import ADDED_CONDITIONS
from catimage_accel.engines.unavailable import EngineUnavailable, why_missing

__all__ = ["RUNTIMES", "OpenVINO", "OpenVINORunner"]

_IR_FILE, _WEIGHTS_FILE, _COMPILED_FILE = "model.xml", "model.bin", "compiled.blob"
_CPU = torch.device("cpu")
# OpenVINO's own, and those of files that another process removes while they are read.
_FAILURES = (RuntimeError, FileNotFoundError, ValueError)


class OpenVINO:
    """See :class:`~catimage_accel.engines.runner.Runtime`.

    "bf16" computes in bfloat16 from float32 weights, where the processor can.
    """

    name = "openvino"
    precisions = ("fp32", "bf16", "int8")
    # Time goes with the rows, so that rows filled up cost as much as others; a compiled model takes about a second to
    # make and 1 to 2 MB on disk, its weights being those of all batch sizes.
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    any_size = True
    batch_invariant = True  # as found for float32 and INT8 UNets and decoders with 1 to 8 rows

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"openvino runs here on a CPU only, and the device is {device}; use 'tensorrt' or 'eager'"
        return why_missing(("onnx", "openvino"), "cpu")

    def version(self) -> str:
        import openvino

        return str(openvino.__version__)

    def runner(
        self, component: Component, profile: ShapeProfile, cache: EngineCache, device: torch.device
    ) -> OpenVINORunner:
        """Raises EngineUnavailable for "bf16" on a processor without it."""
        if component.precision == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineUnavailable("this processor has no bfloat16 arithmetic; use precision 'fp32' or 'int8'")
        return OpenVINORunner(component, profile, cache, self.version())


class OpenVINORunner:
    """See :class:`~catimage_accel.engines.runner.Runner`.

    A batch of the profile's height, width and tokens runs in the model of its batch size, which is compiled when it is
    first met; anything else in one of dynamic shapes, which is slower. The cache keeps the weights once, in OpenVINO's
    format, and each compiled model without them.
    """

    def __init__(self, component: Component, profile: ShapeProfile, cache: EngineCache, version: str) -> None:
        self._component, self._profile, self._cache, self._version = component, profile, cache, version
        # OpenVINO rounds to bfloat16 by itself, where that is faster.
        self._source = replace(component, precision="fp32") if component.precision == "bf16" else component
        self._requests: dict[int | None, Any] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = len(next(iter(inputs.values())))
        bucket = self._profile.bucket(rows) if self._has_profile_shapes(inputs) else None
        try:
            if bucket not in self._requests:
                model = self._compile(None) if bucket is None else self._load(bucket, self._entry(bucket))
                self._requests[bucket] = model.create_infer_request()
            arrays = {name: _array(value, rows if bucket is None else bucket) for name, value in inputs.items()}
            if self._time is not None:
                embedded = [name for name in EMBEDDED if name in arrays]
                features = self._time({name: arrays[name] for name in self._time_inputs})
                arrays |= {EMBEDDED[name]: features[place] for place, name in enumerate(embedded)}
                arrays = {name: value for name, value in arrays.items() if name not in (*EMBEDDED, *ADDED_CONDITIONS)}
            # Inputs are read where they are. Outputs are OpenVINO's, overwritten by the next call: hence the copies.
            results = self._requests[bucket].infer(arrays, share_inputs=True, share_outputs=True)
        except _FAILURES as error:
            raise _unavailable(self._component, error) from error
        return {name: torch.from_numpy(results[name][:rows]).clone() for name in self._outputs}

    def build(self, advance: Callable[[str], None] = lambda _: None) -> list[CacheEntry]:
        entries = []
        for rows in self._profile.rows:
            try:
                entries.append(self._entry(rows))
            except _FAILURES as error:
                raise _unavailable(self._component, error) from error
            advance(f"{self._component.name}, {rows} rows")
        return entries

    @cached_property
    def _outputs(self) -> list[str]:
        return [output.get_any_name() for output in next(iter(self._requests.values())).get_compiled_model().outputs]

    def _has_profile_shapes(self, inputs: Mapping[str, Tensor]) -> bool:
        sides = (self._profile.height, self._profile.width)
        return all(
            tuple(value.shape[2:]) == sides if value.ndim == 4 else value.ndim != 3 or
            value.shape[1] == self._profile.tokens for value in inputs.values()
        )  # fmt: skip

    def _entry(self, rows: int) -> CacheEntry:
        """The cache's entry with the model compiled for a batch size."""
        profile = self._profile
        key = _key(
            self._component, self._version,
            f"rows={rows},height={profile.height},width={profile.width},tokens={profile.tokens}", device_key(_CPU),
            {"weights": read_record(self._weights.folder).files[_WEIGHTS_FILE].sha256, "file": _COMPILED_FILE},
        )  # fmt: skip

        def export_model(folder: Path) -> None:
            with (folder / _COMPILED_FILE).open("wb") as file:
                file.write(self._compile(rows).export_model().getbuffer())

        return self._cache.get_or_build(key, export_model)

    def _load(self, rows: int, entry: CacheEntry) -> Any:
        weights = str(self._weights.folder / _WEIGHTS_FILE)
        try:
            blob = (entry.folder / _COMPILED_FILE).read_bytes()
            return _core().import_model(blob, "CPU", {**self._config, "WEIGHTS_PATH": weights})
        except RuntimeError:  # the processor is of the same name and instructions, but OpenVINO tells them apart
            return self._compile(rows)

    def _compile(self, rows: int | None) -> Any:
        """The model for a batch size, or for any shapes; the latter can't be exported, for its import fails."""
        model = _core().read_model(self._weights.folder / _IR_FILE)
        if self._time is not None:
            model = without_time(model)
        if rows is not None:
            model.reshape({one.get_any_name(): _fixed(one.partial_shape, rows, self._profile) for one in model.inputs})
        return _core().compile_model(model, "CPU", self._config)

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if self._component.precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CACHE_MODE": "OPTIMIZE_SIZE",  # an export leaves the weights out
        }

    @cached_property
    def _time(self) -> Any:
        """What embeds the timestep and SDXL's sizes, if that needs a model of its own: bfloat16 holds no number above
        256 whole."""
        if self._component.precision != "bf16" or self._component.name == "vae_decoder":
            return None
        config = {**self._config, "INFERENCE_PRECISION_HINT": "f32"}
        return _core().compile_model(time_alone(_core().read_model(self._weights.folder / _IR_FILE)), "CPU", config)

    @cached_property
    def _time_inputs(self) -> set[str]:
        return {value.get_any_name() for value in self._time.inputs}

    @property
    def _weights(self) -> CacheEntry:
        """Looked up anew for every model that is compiled, and made again where it was pruned meanwhile."""
        return _weights(self._source, self._cache, self._version)


def _weights(component: Component, cache: EngineCache, version: str) -> CacheEntry:
    """The component in OpenVINO's own format, the same for all shapes, and for processors that add INT8 alike."""
    bits = int8_weight_bits() if component.precision == "int8" else 8

    def convert(folder: Path) -> None:
        import openvino

        model = _core().read_model(export(component, cache, weight_bits=bits).folder / MODEL_FILE)
        openvino.save_model(model, folder / _IR_FILE, compress_to_fp16=False)

    options = {"file": _IR_FILE} | ({} if bits == 8 else {"weight_bits": str(bits)})
    return cache.get_or_build(_key(component, version, "dynamic", "any", options), convert)


def _key(component: Component, version: str, profile: str, device: str, options: dict[str, str]) -> EngineKey:
    scales = component.scales
    return EngineKey(
        component.model_sha256, component.name, component.precision, "" if scales is None else scales.digest,
        profile=profile, runtime="openvino", runtime_version=version, device=device, os=os_key(),
        options=(("format", FORMAT), *options.items()),
    )  # fmt: skip


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _fixed(shape: Any, rows: int, profile: ShapeProfile) -> list[int]:
    """A graph input's shape with its dynamic dimensions filled in; see ``onnx_export`` for what they mean."""
    sizes = [dimension.get_length() if dimension.is_static else -1 for dimension in shape]
    sizes[0] = rows
    if len(sizes) == 4:
        sizes[2:] = profile.height, profile.width
    elif len(sizes) == 3:
        sizes[1] = profile.tokens
    return sizes


def _array(value: Tensor, rows: int) -> Any:
    value = value.to(torch.float32)
    if len(value) < rows:
        value = F.pad(value, (0, 0) * (value.ndim - 1) + (0, rows - len(value)))
    return value.contiguous().numpy()


def _unavailable(component: Component, error: Exception) -> EngineUnavailable:
    if isinstance(error, EngineUnavailable):
        return error
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    reason = (lines or [type(error).__name__])[0]
    return EngineUnavailable(f"openvino can't run the {component.name}: {reason}; use engine 'onnxruntime'")


RUNTIMES = {"openvino": OpenVINO()}
