"""The engine through torch.compile against the eager one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_unets import compare

from catimage_accel.engines import DeepFeatures
from catimage_accel.engines.registry import LoadedEngines


def compile_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and guards as ever, but runs the graph as it is: compiling takes a minute a shape on one core."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_same_steps_and_no_recompiles_for_further_rows(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_without_inductor(monkeypatch)
    torch._dynamo.reset()
    own = LoadedEngines(torch.device("cpu"))
    compiled, eager = own.get(tiny_sd_folder, engines=("compiled",)), own.get(tiny_sd_folder)
    assert compiled.name == "compiled"
    for rows in (2, 3, 5):
        compare(compiled, eager, rows)
    torch._dynamo.config.error_on_recompile = True
    try:
        for rows in (7, 4):
            compare(compiled, eager, rows)
    finally:
        torch._dynamo.config.error_on_recompile = False
    compare(compiled, eager, 4, deep=DeepFeatures())
    features = torch.randn((4, 32, 16, 16), generator=torch.Generator().manual_seed(5))
    compare(compiled, eager, 4, deep=DeepFeatures(features, (1, 3)))


def test_what_torch_cannot_compile_is_left_to_eager(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr("catimage_accel.engines.unavailable._told", set())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="engine 'compiled' can't run here: .*no C\\+\\+ compiler"):
        engine = LoadedEngines(torch.device("cpu")).get(tiny_sd_folder, engines=("compiled",))
    assert engine.name == "eager"
