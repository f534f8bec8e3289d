"""The library of C++ kernels for the CPU: right with every instruction set, and not taken where it does not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from catimage_accel.kernels import build
from catimage_accel.kernels.build import CPU, CpuLibrary

needs_compiler = pytest.mark.skipif(CPU.why_not() is not None, reason=f"the CPU kernels: {CPU.why_not()}")
V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# Names another library before the package is imported: a process can load but one.
PLACE = """
import importlib.util, sys
from pathlib import Path
name = "catimage_accel.kernels.build"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.CPU.path = Path(sys.argv[2])
import catimage_accel.accelerate
from catimage_accel.kernels import cpu
"""
CHECK = """
import torch
assert cpu.BUILT
from catimage_accel.kernels import group_norm
from catimage_accel.kernels.accuracy import allowed_error, largest_error
from test_group_norm import channels_last, formula, inputs, torchs

for dtype in cpu.DTYPES:
    for shape, groups, offset in (((2, 70, 9, 13), 7, 3.0), ((1, 96, 40, 40), 32, 1000.0), ((3, 12, 1, 1), 3, 0.0)):
        x, weight, bias = inputs(shape, dtype, offset)
        shift = torch.randn(shape[:2]).to(dtype)
        for laid_out in (x, channels_last(x)):
            arguments = (laid_out, groups, weight, bias, 1e-5, "silu", shift)
            ours, exact = group_norm(*arguments[:5], activation="silu", shift=shift, impl="cpu"), formula(*arguments)
            assert largest_error(ours, exact) <= allowed_error(torchs(*arguments), exact), (dtype, shape)
            print("right")
"""


def with_library(library: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [sys.executable, "-c", PLACE + code, build.__file__, library],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def processor() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@needs_compiler
@pytest.mark.parametrize(
    ("name", "needed"),
    [
        pytest.param("baseline", set(), id="any processor"),
        pytest.param("x86_64_v3", V3, id="AVX2"),
        pytest.param("x86_64_v4", V4, id="AVX-512"),
    ],
)
def test_right_with_the_instructions_of(name: str, needed: set[str], tmp_path: Path) -> None:
    if not needed <= processor():
        pytest.skip(f"the processor lacks {', '.join(sorted(needed - processor()))}")
    library = CpuLibrary(tmp_path / "kernels.so", CPU.sources)
    # As baseline, which is what a library that knows no others takes.
    library.x86_64, library.instruction_sets = False, {"baseline": CPU.instruction_sets[name]}
    library.compile(library.path)
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]
    assert not library.is_stale(library.path)
    run = with_library(library.path, CHECK)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["right"] * 12


@needs_compiler
def test_what_does_not_compile_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU, "flags", ("-std=c++1",))
    with pytest.raises(RuntimeError, match=r"(?s) failed:.*c\+\+1"):
        CPU.compile(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_is_named_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert CPU.find_compiler() is None
    monkeypatch.setenv("CXX", "my-c++")
    assert CPU.find_compiler() == compiler


@needs_compiler
def test_a_library_that_does_not_load_is_not_used(tmp_path: Path) -> None:
    """As of another kind of machine, or made for a PyTorch that is not there."""
    library = tmp_path / "kernels.so"
    assert CPU.sources is not None
    library.write_bytes(b"ELF" + bytes.fromhex(CPU.digest(CPU.sources)))
    run = with_library(library, "print(cpu.BUILT)")
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
    assert f"{library} is not used: " in run.stderr
    assert "rebuild: python -m catimage_accel.kernels.cpu" in run.stderr


@needs_compiler
def test_the_command_builds_it_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CPU, "path", tmp_path / "cpu" / "kernels.so")
    CPU.build()
    assert capsys.readouterr().out == f"built {tmp_path / 'cpu' / 'kernels.so'}\n"
    assert (tmp_path / "cpu" / "kernels.so").stat().st_size > 10_000
