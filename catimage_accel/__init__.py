"""Draws every prompt with the cheapest diffusers candidate that draws it well, as fast as the machine allows.

The public names are loaded when first used, so that ``import catimage_accel`` costs milliseconds.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catimage_accel.accelerate import accelerate, restore
    from catimage_accel.catalog import Candidate, Catalog
    from catimage_accel.efficient_decoder import EfficientDecoderKL
    from catimage_accel.efficient_unet import EfficientUNet
    from catimage_accel.pipeline import RoutedPipeline
    from catimage_accel.routing import Router

__version__ = "0.1.0"
__all__ = [
    "Candidate", "Catalog", "EfficientDecoderKL", "EfficientUNet", "RoutedPipeline", "Router", "accelerate", "restore",
]  # fmt: skip

_HOMES = {
    "Candidate": "catimage_accel.catalog",
    "Catalog": "catimage_accel.catalog",
    "EfficientDecoderKL": "catimage_accel.efficient_decoder",
    "EfficientUNet": "catimage_accel.efficient_unet",
    "RoutedPipeline": "catimage_accel.pipeline",
    "Router": "catimage_accel.routing",
    "accelerate": "catimage_accel.accelerate",
    "restore": "catimage_accel.accelerate",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule `accelerate` would bind it over the public function of that name.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
