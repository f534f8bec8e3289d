"""A metric's model files: found in a folder or, by an id that the user named, on the hub; read without running them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from catimage_accel.hub import HUB_ID, download

if TYPE_CHECKING:
    import torch

def model_folder(source: str | Path, accepted: str, files: Sequence[str]) -> Path:
    """The folder ``source``, or the hub repository of that id brought into the hub's cache.

    A folder that exists wins; only a string may be a hub id, and only ``files`` (patterns) of it are downloaded.
    FileNotFoundError, saying what is ``accepted``, for anything else and for what the hub does not give.
    """
    if Path(source).is_dir():
        return Path(source)
    if not isinstance(source, str) or not HUB_ID.fullmatch(source) or Path(source).exists():
        raise FileNotFoundError(f"no folder {source}, expected {accepted}")
    try:
        return download(source, files)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; expected {accepted}") from None


def read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors by name in a file .safetensors, .pth or .pt; ValueError for one that holds or is anything else."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are {path}; accepted: a file .safetensors, .pth or .pt")
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} could not be read as tensors alone: {reason}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; accepted: tensors by name (a state dict)")
    return tensors


def digest(files: Iterable[Path]) -> str:
    """The sha256 of the files' contents, by which models are told apart."""
    joined = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            joined.update(hashlib.file_digest(file, "sha256").digest())
    return joined.hexdigest()
