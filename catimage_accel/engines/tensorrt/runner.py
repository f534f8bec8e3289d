"""One component in TensorRT or TensorRT-RTX: built once, loaded once, run at the batch sizes of its profile."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catimage_accel.engines.cache import CacheEntry, EngineCache, EngineKey
from catimage_accel.engines.components import Component, ShapeProfile
from catimage_accel.engines.machine import device_key, os_key
from catimage_accel.engines.onnx_export import MODEL_FILE, export, export_key
from catimage_accel.engines.tensorrt.api import Library
from catimage_accel.engines.tensorrt.builder import build_engine
from catimage_accel.engines.tensorrt.contexts import Contexts
from catimage_accel.engines.tensorrt.cuda import Lane, current
from catimage_accel.engines.tensorrt.execution import Bucket
from catimage_accel.engines.tensorrt.layers import Layer, layers_of_inspector
from catimage_accel.engines.tensorrt.log import Log, listener
from catimage_accel.engines.tensorrt.shapes import check_inputs
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.kernels.device import device_name
from catimage_accel.storage import write_atomic

__all__ = ["ENGINE_FILE", "TensorRTRunner"]

ENGINE_FILE = "engine.plan"
_ROWS = re.compile(r"rows=(\d+(?:\+\d+)*),")
_HIGH_PRECISION = "fp16"  # of the layers that are not quantized, on a CUDA device


class TensorRTRunner:
    """See :class:`~catimage_accel.engines.runner.Runner`. One engine covers all batch sizes of the profile.

    Its cache key names the ONNX file, and so the weights: other weights, a merged LoRA for one, are another engine.
    """

    def __init__(
        self, library: Library, component: Component, profile: ShapeProfile, cache: EngineCache, device: torch.device
    ) -> None:
        self.library, self.component, self.profile = library, component, profile
        self.cache, self.device = cache, device
        self._loaded: _Loaded | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs on the device, in the types of the graph; work is enqueued on the caller's stream, no host copy.

        Inputs are on the device, in any type. See :meth:`Runner.__call__` for what is raised.
        """
        check_inputs(inputs, self.profile)
        for name, value in inputs.items():
            if value.device.type != self.device.type:
                raise ValueError(f"{name} is on {value.device}; accepted: {self.device}")
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded.run(inputs)

    @property
    def graphs(self) -> tuple[int, ...]:
        """The batch sizes for which a captured CUDA graph is replayed; none for TensorRT-RTX, which captures itself."""
        return () if self._loaded is None else self._loaded.graphs

    def build(
        self,
        advance: Callable[[str], None] = lambda _: None,
        progress: Callable[[str, float], None] = lambda *_: None,
    ) -> list[CacheEntry]:
        """As :meth:`Runner.build`; ``progress`` is told the phase of the build and the share done, 0 to 1."""
        entry = self._entry(progress)
        advance(self.component.name)
        return [entry]

    def _entry(self, progress: Callable[[str, float], None] = lambda *_: None) -> CacheEntry:
        key = self.key
        if (entry := self.cache.find(key)) is not None:
            return entry
        # Before the engine's build, which is timed.
        onnx = export(self.component, self.cache, high_precision=_HIGH_PRECISION)
        return self.cache.get_or_build(key, lambda folder: self._build(onnx, folder, progress))

    @property
    def key(self) -> EngineKey:
        """What the engine is called in the cache."""
        return self._key(self.profile)

    def _key(self, profile: ShapeProfile) -> EngineKey:
        onnx = export_key(self.component, _HIGH_PRECISION)
        shapes = (
            f"rows={'+'.join(map(str, profile.rows))},height={profile.height},width={profile.width},"
            f"tokens={profile.tokens}"
        )
        return replace(
            onnx, profile=shapes, runtime=self.library.name, runtime_version=self.library.version(),
            device=self._device_key(), os=os_key(), options=(("onnx", onnx.digest),),
        )  # fmt: skip

    def _device_key(self) -> str:
        """What the engine can run on: one kind of device for TensorRT, a range of them for TensorRT-RTX."""
        if not self.library.ahead_of_time:
            return f"{device_key(self.device)} {device_name(self.device)}"
        turing = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 0)
        return device_key(self.device) if turing else "sm_80 and later"

    def _build(self, onnx: CacheEntry, folder: Path, progress: Callable[[str, float], None]) -> None:
        if not self.library.ahead_of_time and self.device.type != "cuda":
            raise EngineUnavailable(
                f"{self.library.title} builds on the CUDA device that is to run the engine, and the device is "
                f"{self.device}; build on a machine with one, or with engine 'tensorrt-rtx'"
            )
        times = re.sub(r"[^\w.]+", "-", f"{self._device_key()} {self.library.version()}.timing")
        built = build_engine(
            self.library, onnx.folder / MODEL_FILE, self.profile, device=self.device,
            timing_cache=self.cache.folder / "tensorrt" / times, advance=progress,
        )  # fmt: skip
        write_atomic(folder / ENGINE_FILE, built.plan)
        table = built.table
        if not self.library.ahead_of_time:
            with current(self.device):
                table = replace(table, source="inspector", layers=_inspect(self.library, built.plan))
        table.save(folder)

    def _load(self) -> _Loaded:
        """The engine, built if need be; one that is whole but not for this device or version is built again, once."""
        lane = Lane(self.device)
        profile, entry = self._cached() or (self.profile, self._entry())
        with contextlib.suppress(_NotLoadable):
            return _Loaded(self.library, entry, profile, lane)
        warnings.warn(
            f"the {self.component.name} for {self.library.name} in the engine cache does not load here and is built "
            f"again ({entry.folder})", UserWarning, stacklevel=3,
        )  # fmt: skip
        self.cache.discard(entry.key)
        return _Loaded(self.library, self._entry(), self.profile, lane)

    def _cached(self) -> tuple[ShapeProfile, CacheEntry] | None:
        """The engine in the cache; failing that one for other batch sizes, the largest of which is large enough."""
        if (entry := self.cache.find(self.key)) is not None:
            return self.profile, entry
        for other in self.cache.entries():
            match = _ROWS.match(other.key.profile)
            if match is None or other.key.runtime != self.library.name:
                continue
            profile = replace(self.profile, rows=tuple(map(int, match[1].split("+"))))
            if profile.rows[-1] < self.profile.rows[-1] or self._key(profile) != other.key:
                continue
            if (entry := self.cache.find(other.key)) is not None:
                return profile, entry
        return None


class _NotLoadable(EngineUnavailable):
    """A serialized engine that this library refuses on this device."""


class _Loaded:
    """A deserialized engine with a bucket for each batch size in use."""

    def __init__(self, library: Library, entry: CacheEntry, profile: ShapeProfile, lane: Lane) -> None:
        self._library, self._profile, self._lane, self._log = library, profile, lane, Log()
        with current(lane.device):
            self._engine, self._alive = _deserialize(library, (entry.folder / ENGINE_FILE).read_bytes(), self._log)
            self._contexts = Contexts(library, self._engine, _kernels(entry))
        self._buckets: dict[int, Bucket] = {}

    @property
    def graphs(self) -> tuple[int, ...]:
        return tuple(bucket.rows for bucket in self._buckets.values() if bucket.captured)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows, index = check_inputs(inputs, self._profile)
        with self._lane.call():
            if index in self._buckets:
                return self._buckets[index].run(inputs, rows)
            bucket = Bucket(self._library, self._engine, self._contexts, index, self._lane, self._log)
            outputs = bucket.run(inputs, rows)
            self._buckets[index] = bucket
        self._contexts.keep()
        return outputs


def _kernels(entry: CacheEntry) -> Path:
    """Where what is compiled for an entry on its device is kept; what belonged to entries that are gone goes."""
    folder = entry.folder.parent / "tensorrt"
    for path in folder.glob("*.kernels"):
        if not (entry.folder.parent / path.stem).is_dir():
            path.unlink(missing_ok=True)
    return folder / f"{entry.key.digest}.kernels"


def _deserialize(library: Library, plan: bytes, log: Log) -> tuple[Any, tuple[Any, ...]]:
    """The engine, and what has to live as long as it does."""
    trt = library.load()
    logger = listener(trt, log)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _NotLoadable(f"{library.title} {library.version()} can't load the engine: {log.reason()}")
    return engine, (logger, runtime)


def _inspect(library: Library, plan: bytes) -> tuple[Layer, ...]:
    trt = library.load()
    engine, _alive = _deserialize(library, plan, Log())
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return tuple(layers_of_inspector(text))
