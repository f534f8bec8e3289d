"""Which engines there are, and the ones that are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.loading import check_model_folder, check_precision
from catimage_accel.engines.protocol import Engine

__all__ = ["ENGINES", "LoadedEngines"]

ENGINES = ("eager",)


class LoadedEngines:
    """Loads each engine once; text encoder and decoder once a folder and precision."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._engines: dict[tuple[Path, str, tuple[str, ...], str, Path | None], Engine] = {}
        self._shared: dict[tuple[Path, str], SharedParts] = {}

    def check(
        self, model: Path, unet: str, engines: Sequence[str], precision: str, quantization: Path | None = None
    ) -> None:
        """Raises what :meth:`get` would, as far as that can be known without reading weights."""
        for engine in engines:
            if engine not in ENGINES:
                raise ValueError(f"engine is {engine!r}; accepted: {', '.join(ENGINES)}")
        check_precision(precision, self.device)
        check_model_folder(model, unet)

    def get(
        self,
        model: Path,
        unet: str = "unet",
        engines: Sequence[str] = ("eager",),
        precision: str = "fp32",
        quantization: Path | None = None,
        *,
        deepcache: bool = False,
    ) -> Engine:
        """The engine, loaded at the first call."""
        model = model.resolve()
        key = (model, unet, tuple(engines), precision, quantization)
        if key not in self._engines:
            self.check(model, unet, engines, precision, quantization)
            shared = self._shared.get((model, precision))
            if shared is None:
                shared = SharedParts(model, check_precision(precision, self.device), self.device)
                self._shared[model, precision] = shared
            self._engines[key] = EagerEngine(model, unet, precision, self.device, shared)
        return self._engines[key]
