"""The library of CUDA kernels knows the sources that it was built from."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catimage_accel.kernels import cuda
from catimage_accel.kernels.cuda import build


@pytest.mark.parametrize(
    ("change", "built"),
    [
        (lambda csrc: None, True),
        (lambda csrc: (csrc / "moments.cuh").write_text("// other"), False),
        (lambda csrc: (csrc / "new.cu").touch(), False),
        (lambda csrc: (csrc / "moments.cuh").rename(csrc / "other.cuh"), False),
        (lambda csrc: (csrc / "notes.md").touch(), True),
        (shutil.rmtree, True),
    ],
    ids=["unchanged", "a header changed", "a file came", "a file renamed", "no source", "installed without sources"],
)
def test_a_library_of_other_sources_is_not_used(
    change: Callable[[Path], Any], built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc, library = tmp_path / "csrc", tmp_path / "kernels.so"
    assert build.SOURCES is not None
    shutil.copytree(build.SOURCES, csrc)
    library.write_bytes(b"ELF" + bytes.fromhex(build.digest(csrc)) + b"code")
    change(csrc)
    monkeypatch.setattr(build, "SOURCES", csrc if csrc.is_dir() else None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert cuda.is_built(library) == built
    message = f"{library} was built from other CUDA sources than there are now and is not used; "
    message += "rebuild: python -m catimage_accel.kernels.cuda"
    assert [str(warning.message) for warning in told] == ([] if built else [message])
    assert not cuda.is_built(tmp_path / "missing.so")
