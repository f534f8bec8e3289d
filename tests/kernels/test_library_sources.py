"""A library of kernels knows the sources that it was built from, and says what it lacks to be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catimage_accel.kernels import build
from catimage_accel.kernels.build import CPU, CUDA, Library
from catimage_accel.kernels.built import is_built

each_library = pytest.mark.parametrize("library", [CUDA, CPU], ids=lambda library: library.kind)
HEADER = {"CUDA": "moments.cuh", "CPU": "group_norm.h"}
NEW = {"CUDA": "new.cu", "CPU": "new.cpp"}


@each_library
@pytest.mark.parametrize(
    ("change", "built"),
    [
        (lambda csrc, kind: None, True),
        (lambda csrc, kind: (csrc / HEADER[kind]).write_text("// other"), False),
        (lambda csrc, kind: (csrc / NEW[kind]).touch(), False),
        (lambda csrc, kind: (csrc / HEADER[kind]).rename(csrc / f"other{Path(HEADER[kind]).suffix}"), False),
        (lambda csrc, kind: (csrc / "notes.md").touch(), True),
        (lambda csrc, kind: shutil.rmtree(csrc), True),
    ],
    ids=["unchanged", "a header changed", "a file came", "a file renamed", "no source", "installed without sources"],
)
def test_a_library_of_other_sources_is_not_used(
    library: Library, change: Callable[[Path, str], Any], built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc, path = tmp_path / "csrc", tmp_path / "kernels.so"
    assert library.sources is not None
    shutil.copytree(library.sources, csrc)
    path.write_bytes(b"ELF" + bytes.fromhex(library.digest(csrc)) + b"code")
    change(csrc, library.kind)
    monkeypatch.setattr(library, "sources", csrc if csrc.is_dir() else None)
    monkeypatch.setattr(library, "path", path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert is_built(library) == built
    message = f"{path} was built from other {library.kind} sources than there are now and is not used; "
    message += f"rebuild: python -m catimage_accel.kernels.{library.kind.lower()}"
    assert [str(warning.message) for warning in told] == ([] if built else [message])
    monkeypatch.setattr(library, "path", tmp_path / "missing.so")
    assert not is_built(library)


@each_library
def test_says_what_is_missing(library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert library.why_not() == library.missing_compiler()
    monkeypatch.setattr(library, "find_compiler", lambda: tmp_path)
    monkeypatch.setattr(build, "find_torch", lambda: tmp_path)
    assert library.why_not() == f"the PyTorch in {tmp_path} has no headers of the stable ABI"
    monkeypatch.setattr(build, "find_torch", lambda: None)
    missing = f"PyTorch is not installed where this is built; once it is: {library.how_to_build}"
    assert library.why_not() == missing
    with pytest.raises(RuntimeError, match=f"the {library.kind} kernels cannot be built: {missing}"):
        library.compile(tmp_path / "kernels.so")
    with pytest.raises(SystemExit, match=f"the {library.kind} kernels cannot be built: {missing}"):
        library.build()


@pytest.mark.parametrize("arguments", [[], ["rocm"], ["cpu", "cuda"]], ids=["none", "unknown", "two"])
def test_the_script_wants_the_name_of_one_library(arguments: list[str]) -> None:
    run = subprocess.run([sys.executable, build.__file__, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == f"usage: python {build.__file__} cuda|cpu\n"
