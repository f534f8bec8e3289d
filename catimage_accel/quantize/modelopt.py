"""NVIDIA ModelOpt, imported when it is needed and kept quiet."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

__all__ = ["load_modelopt", "quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard output and standard error, and no warnings: ModelOpt reports on both as it goes."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load_modelopt() -> Any:
    """``modelopt.torch.quantization``; ImportError with the remedy where it is not installed."""
    try:
        with quiet():
            import modelopt.torch.quantization as mtq
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "modelopt":
            raise
        raise ImportError(
            "quantization needs nvidia-modelopt, which is not installed; `pip install 'catimage-accel[quantize]'`"
        ) from None
    return mtq
