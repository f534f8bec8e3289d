"""Which engines there are, and the ones that are loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.loading import check_model_folder, check_precision
from catimage_accel.engines.protocol import Engine

__all__ = ["ENGINES", "EngineCache"]

ENGINES = ("eager",)


class EngineCache:
    """Loads each (model folder, UNet, engine, precision) once; text encoder and decoder once a folder and precision."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._engines: dict[tuple[Path, str, str, str], Engine] = {}
        self._shared: dict[tuple[Path, str], SharedParts] = {}

    def check(self, model: Path, unet: str, engine: str, precision: str) -> None:
        """Raises what :meth:`get` would, as far as that can be known without reading weights."""
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; accepted: {', '.join(ENGINES)}")
        check_precision(precision, self.device)
        check_model_folder(model, unet)

    def get(self, model: Path, unet: str = "unet", engine: str = "eager", precision: str = "fp32") -> Engine:
        """The engine, loaded at the first call."""
        model = model.resolve()
        key = (model, unet, engine, precision)
        if key not in self._engines:
            self.check(model, unet, engine, precision)
            shared = self._shared.get((model, precision))
            if shared is None:
                shared = SharedParts(model, check_precision(precision, self.device), self.device)
                self._shared[model, precision] = shared
            self._engines[key] = EagerEngine(model, unet, precision, self.device, shared)
        return self._engines[key]
