"""Engines: what runs a candidate's text encoder, UNet and decoder. One protocol, and the eager (PyTorch) engine."""

from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.loading import PRECISIONS, check_model_folder, check_precision
from catimage_accel.engines.protocol import DeepFeatures, Engine, TextBatch, TextState
from catimage_accel.engines.registry import ENGINES, LoadedEngines
from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "DeepFeatures",
    "EagerEngine",
    "Engine",
    "EngineUnavailable",
    "LoadedEngines",
    "SharedParts",
    "TextBatch",
    "TextState",
    "check_model_folder",
    "check_precision",
]
