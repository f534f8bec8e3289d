"""What is downloaded of repositories on the hub."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from catimage_accel import Catalog
from catimage_accel.executor import Executor


def test_of_a_model_on_the_hub_no_more_is_downloaded_than_is_read(
    tiny_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As such repositories are: whole checkpoints, weights twice over; of one part in float16 alone."""
    hub = shutil.copytree(tiny_catalog / "model", tmp_path / "hub")
    for part in ("unet", "vae"):
        weights = hub / part / "diffusion_pytorch_model.safetensors"
        half = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
        weights.rename(half) if part == "vae" else shutil.copy(weights, half)
    shutil.copytree(hub / "unet", hub / "unet_other")
    for name in ("sd.safetensors", "unet/diffusion_pytorch_model.bin", "unet/model.onnx"):
        (hub / name).touch()
    cache = tmp_path / "cache"

    def snapshot_download(_: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in wanted:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    catalog = Catalog.load(tiny_catalog)
    candidates = tuple(dataclasses.replace(one, model="owner/tiny") for one in catalog.candidates)
    dataclasses.replace(catalog, candidates=candidates).resolve_model("owner/tiny")
    assert {str(path.relative_to(cache)) for path in cache.rglob("*.*") if path.suffix not in (".json", ".txt")} == {
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    Executor(device="cpu", resolve_model=lambda _: cache).check(candidates[0])
