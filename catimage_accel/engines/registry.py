"""Which engines there are, and the ones that are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from catimage_accel.candidate import OWN_VAE, QUANTIZED_PRECISIONS
from catimage_accel.engines.cache import EngineCache
from catimage_accel.engines.eager import SharedParts
from catimage_accel.engines.graph import GraphEngine
from catimage_accel.engines.loading import check_model_folder, check_precision
from catimage_accel.engines.protocol import Engine
from catimage_accel.engines.runner import Runtime
from catimage_accel.engines.unavailable import EngineUnavailable, tell_once
from catimage_accel.lora import UNetPart
from catimage_accel.quantize.quantization import Quantization

__all__ = ["ENGINES", "LoadedEngines", "find_runtime", "precisions_of"]

# Engine -> "module:class" of one in PyTorch, made as EagerEngine is.
_IN_TORCH = {
    "eager": "catimage_accel.engines.eager:EagerEngine",
    "fused": "catimage_accel.engines.fused:FusedEngine",
    "compiled": "catimage_accel.engines.compiled:CompiledEngine",
    "triton": "catimage_accel.engines.triton_int8:TritonInt8Engine",
}
# Engine -> module whose RUNTIMES holds its Runtime.
_RUNTIMES = {
    "onnxruntime": "catimage_accel.engines.onnxruntime",
    "openvino": "catimage_accel.engines.openvino",
    "tensorrt": "catimage_accel.engines.tensorrt",
    "tensorrt-rtx": "catimage_accel.engines.tensorrt",
}
ENGINES = (*_IN_TORCH, *_RUNTIMES)
LAST = "eager"


def find_runtime(engine: str) -> Runtime:
    """The runtime of that name; ValueError for engines that have none."""
    if engine not in _RUNTIMES:
        raise ValueError(f"engine is {engine!r}; accepted: {', '.join(_RUNTIMES)}")
    runtime: Runtime = import_module(_RUNTIMES[engine]).RUNTIMES[engine]
    return runtime


def precisions_of(engine: str) -> tuple[str, ...]:
    """The precisions that an engine runs anywhere; ValueError for a name that is none of ``ENGINES``."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; accepted: {', '.join(ENGINES)}")
    precisions: tuple[str, ...] = (find_runtime(engine) if engine in _RUNTIMES else _in_torch(engine)).precisions
    return precisions


class LoadedEngines:
    """Loads each engine once; text encoder and decoders once a folder and type."""

    def __init__(self, device: torch.device, cache: EngineCache | None = None, *, fall_back: bool = True) -> None:
        """``cache`` is where built graphs are kept; None: the user's own, opened when one is asked for.

        Without ``fall_back`` :meth:`get` tries no engine but those that it is given.
        """
        self.device = device
        self._last = (LAST,) if fall_back else ()
        self._cache = cache
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self._failed: dict[tuple[Any, ...], EngineUnavailable] = {}
        self._shared: dict[tuple[Path, torch.dtype], SharedParts] = {}

    def check(
        self, model: Path, unet: UNetPart, engines: Sequence[str], precision: str, quantization: Path | None = None,
        vae: str = OWN_VAE,
    ) -> None:  # fmt: skip
        """Raises what :meth:`get` would, as far as that can be known without reading weights.

        ValueError for unknown engines, precisions that one of ``engines`` never runs, and quantized precisions without
        ``quantization`` or others with it; FileNotFoundError or ValueError for folders that can't be used.
        """
        for engine in engines:
            accepted = precisions_of(engine)
            if precision not in accepted:
                raise ValueError(f"precision is {precision!r} with engine {engine!r}; accepted: {', '.join(accepted)}")
        check_precision(precision, self.device)
        check_model_folder(model, unet, vae)
        if (precision in QUANTIZED_PRECISIONS) != (quantization is not None):
            raise ValueError(
                f"precision is {precision!r} and quantization {quantization}; accepted: a folder that "
                f"`catimage quantize` wrote with {' or '.join(QUANTIZED_PRECISIONS)}, none else"
            )
        if quantization is not None and (found := Quantization.load(quantization).format) != precision:
            raise ValueError(f"precision is {precision!r}, but {quantization} holds {found!r} scales")

    def get(
        self,
        model: Path,
        unet: UNetPart = "unet",
        engines: Sequence[str] = (LAST,),
        precision: str = "fp32",
        quantization: Path | None = None,
        *,
        deepcache: bool = False,
        vae: str = OWN_VAE,
    ) -> Engine:
        """The first of ``engines`` that works here, else the eager one; loaded, or built, at the first call.

        ``deepcache``: it will be asked for deep features. ``vae``: it will be asked to decode with that VAE, whose
        weights are read now; the engine is the same for all of them. One UserWarning a process for every engine and
        reason that it could not be.
        """
        model = model.resolve()
        self.check(model, unet, engines, precision, quantization, vae)
        names = list(dict.fromkeys((*engines, *self._last)))
        for engine, following in zip(names, [*names[1:], None], strict=True):
            try:
                found = self._get(engine, model, unet, precision, quantization, deepcache)
                self._shared[model, found.dtype].vae(vae)
                return found
            except EngineUnavailable as error:
                if following is None:
                    raise
                tell_once(f"engine {engine!r} can't run here: {error}. Next is {following!r}")
        raise AssertionError("the last engine either works or raises")

    def _get(
        self, engine: str, model: Path, unet: UNetPart, precision: str, quantization: Path | None, deepcache: bool
    ) -> Engine:
        key = (engine, model, unet, precision, quantization)
        for part in (key, (*key, "deepcache")):
            if part in self._failed and (deepcache or part is key):
                raise self._failed[part]
        if key not in self._engines:
            try:
                self._engines[key] = self._load(engine, model, unet, precision, quantization)
            except EngineUnavailable as error:
                self._failed[key] = error
                raise
        loaded = self._engines[key]
        if deepcache and isinstance(loaded, GraphEngine):
            try:
                loaded.prepare_deepcache()
            except EngineUnavailable as error:
                self._failed[*key, "deepcache"] = error
                raise
        return loaded

    def _load(self, engine: str, model: Path, unet: UNetPart, precision: str, quantization: Path | None) -> Engine:
        # Looked at before the shared parts are read, which take longer.
        kind = find_runtime(engine) if engine in _RUNTIMES else _in_torch(engine)
        if (reason := kind.why_not(self.device)) is not None:
            raise EngineUnavailable(reason)
        dtype = check_precision(precision, self.device)
        if (model, dtype) not in self._shared:
            self._shared[model, dtype] = SharedParts(model, dtype, self.device)
        shared = self._shared[model, dtype]
        if engine in _RUNTIMES:
            self._cache = self._cache or EngineCache()
            runtime = find_runtime(engine)
            return GraphEngine(runtime, model, unet, precision, self.device, shared, quantization, self._cache)
        made: Engine = _in_torch(engine)(model, unet, precision, self.device, shared, quantization)
        return made


def _in_torch(engine: str) -> Any:
    module, _, name = _IN_TORCH[engine].partition(":")
    return getattr(import_module(module), name)
