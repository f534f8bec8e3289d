"""An ONNX file becomes a serialized engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from catimage_accel.engines.components import ShapeProfile
from catimage_accel.engines.tensorrt.api import Library
from catimage_accel.engines.tensorrt.cuda import current
from catimage_accel.engines.tensorrt.layers import LayerTable
from catimage_accel.engines.tensorrt.log import Log, listener
from catimage_accel.engines.tensorrt.progress import Progress, progress_monitor
from catimage_accel.engines.tensorrt.shapes import input_shape
from catimage_accel.engines.unavailable import EngineUnavailable
from catimage_accel.storage import write_atomic

__all__ = ["Built", "build_engine"]


@dataclass(frozen=True)
class Built:
    """``plan`` is the serialized engine, ``table`` the layers that the builder told of."""

    plan: bytes
    table: LayerTable


def build_engine(
    library: Library,
    onnx: Path,
    profile: ShapeProfile,
    *,
    device: torch.device,
    timing_cache: Path | None = None,
    advance: Callable[[str, float], None] = lambda *_: None,
) -> Built:
    """Builds the engine of ``onnx``, with one optimization profile for each batch size of ``profile``.

    An optimization profile holds for exactly its shapes, so that every batch size gets kernels of its own. Everything
    is computed in the types that the file names; float32 is never rounded to TF32. ``timing_cache``, where the library
    measures, is read before and extended after. ``advance`` gets the phase and the share done, 0 to 1. Raises
    EngineUnavailable in one line if the file can't be parsed or built, ValueError if its inputs don't fit ``profile``.
    """
    trt = library.load()
    log, progress = Log(), Progress(advance)
    logger, monitor = listener(trt, log), progress_monitor(trt, progress)
    with current(device):
        builder = trt.Builder(logger)
        network = library.create_network(builder)
        _parse(library, network, logger, onnx, log)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = monitor
        config.clear_flag(trt.BuilderFlag.TF32)
        _target(library, config, device)
        for rows in profile.rows:
            _add_profile(builder, network, config, profile, rows)
        with _timing_cache(library, config, timing_cache):
            plan = builder.build_serialized_network(network, config)
    if progress.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineUnavailable(f"{library.title} {trt.__version__} can't build {onnx.name}: {log.reason()}")
    return Built(bytes(memoryview(plan)), LayerTable("log", log.quantized_weights(), tuple(log.layers())))


def _parse(library: Library, network: Any, logger: Any, onnx: Path, log: Log) -> None:
    """Fills ``network``; what can't be read raises EngineUnavailable naming the first node at fault."""
    trt = library.load()
    if not onnx.is_file():
        raise FileNotFoundError(f"{onnx} is missing; an ONNX file is needed")
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        if network.num_outputs:
            return
        problem = "it has no outputs; accepted: an ONNX file with a graph"
    elif not parser.num_errors:
        problem = log.reason()
    else:
        error = parser.get_error(0)
        node = f"node {error.node_name() or error.node()} ({error.node_operator()}): " if error.node_operator() else ""
        more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
        problem = f"{node}{' '.join(error.desc().split())}{more}"
    raise EngineUnavailable(f"{library.title} {trt.__version__} can't read {onnx.name}: {problem}")


def _target(library: Library, config: Any, device: torch.device) -> None:
    """What to build for, and how much memory trying kernels out may take."""
    trt = library.load()
    if library.ahead_of_time:
        # By default for Ampere and all later ones at once; an older device has to be named.
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    elif device.type == "cuda":
        # All the device has is the default, and a build beside loaded models would run out of it.
        free, _ = torch.cuda.mem_get_info(device)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, free // 2)


def _add_profile(builder: Any, network: Any, config: Any, profile: ShapeProfile, rows: int) -> None:
    exact = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        known = tuple(tensor.shape)
        shape = input_shape(tensor.name, known, profile, rows)
        if any(own not in (-1, size) for own, size in zip(known, shape, strict=True)):
            raise ValueError(f"{tensor.name} is {known} in the file and {shape} in {profile}; -1 is any size")
        exact.set_shape(tensor.name, shape, shape, shape)
    if config.add_optimization_profile(exact) < 0:
        raise ValueError(f"{profile} makes no optimization profile for the file's inputs")


@contextlib.contextmanager
def _timing_cache(library: Library, config: Any, path: Path | None) -> Iterator[None]:
    """Measured kernels, shared by the builds of a version on a device."""
    if library.ahead_of_time or path is None:
        yield
        return
    cache = config.create_timing_cache(_read(path))
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another driver or device
        config.set_timing_cache(cache, False)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if others := _read(path):
            cache.combine(config.create_timing_cache(others), False)
        write_atomic(path, bytes(memoryview(cache.serialize())))


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
