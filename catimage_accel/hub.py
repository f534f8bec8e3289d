"""Models, catalogs and LoRA of the Hugging Face hub: what a name means there, and what is downloaded of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HUB_ID", "LORA_FILE", "download", "download_file", "download_model", "hub_lora"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA."""
_LORA = re.compile(rf"(?P<repository>{HUB_ID.pattern})(?:/(?P<file>[\w./-]+\.safetensors))?")
_TEXTS, _WEIGHTS = ("*.json", "*.txt", "*.toml", "*.model"), ("*.safetensors", "*.parquet")
_VARIANTS = ("*.fp16*.safetensors", "*.non_ema*.safetensors")
"""Weights that most models of the hub have beside the plain ones."""


def hub_lora(lora: str) -> tuple[str, str] | None:
    """(repository, file) of a LoRA that may be on the hub; None for what is a path."""
    found = _LORA.fullmatch(lora)
    if found is None or (found["file"] is None and lora.endswith(".safetensors")):
        return None
    return found["repository"], found["file"] or LORA_FILE


def download(repository: str, allow: Sequence[str] = (*_TEXTS, *_WEIGHTS), ignore: Sequence[str] = ()) -> Path:
    """The folder of a repository, with the files that match ``allow`` and not ``ignore``; never a pickle.

    What was downloaded before is not downloaded again. FileNotFoundError, one line, if the hub doesn't give it.
    """
    from huggingface_hub import snapshot_download

    with _told_in_one_line(repository, "folder"):
        return Path(snapshot_download(repository, allow_patterns=list(allow), ignore_patterns=list(ignore)))


def download_model(repository: str, parts: Sequence[str]) -> Path:
    """The folder of a diffusers model with the weights of its subfolders ``parts``: the plain ones, if there are any.

    Repositories hold them several times over: whole checkpoints, and in float16 besides.
    """
    weights = {part: f"{part}/*.safetensors" for part in parts}
    folder = download(repository, (*_TEXTS, *weights.values()), _VARIANTS)
    lacking = [part for part in parts if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors"))]
    return download(repository, [weights[part] for part in lacking]) if lacking else folder


def download_file(repository: str, file: str) -> Path:
    """One file of a repository; otherwise as :func:`download`."""
    from huggingface_hub import hf_hub_download

    with _told_in_one_line(f"{repository}/{file}", "file"):
        return Path(hf_hub_download(repository, file))


@contextmanager
def _told_in_one_line(name: str, what: str) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"{name!r} is not a {what} here and could not be had from the hub: {reason}"
        raise FileNotFoundError(text) from None
