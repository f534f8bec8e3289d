"""What built engines call the machine they run on."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from catimage_accel.engines import machine
from catimage_accel.engines.machine import bfloat16_arithmetic, device_key, int8_weight_bits, os_key
from catimage_accel.kernels.device import device_name

CPU = torch.device("cpu")


def test_the_processor_is_named_with_its_instruction_sets() -> None:
    name, *sets = device_key(CPU).removeprefix(f"cpu: {device_name(CPU)}").split(" ")
    assert name == ""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64" and capability.startswith("AVX"):
        assert {"AVX512": "avx512f", "AVX2": "avx2"}[capability] in sets
    assert sets == list(dict.fromkeys(sets))
    assert device_key(CPU).isprintable()


@pytest.mark.parametrize(
    ("cpuinfo", "ending"),
    [
        pytest.param("model name: X\nflags\t\t: fpu avx2 amx_int8\n", " avx2 amx_int8", id="x86"),
        pytest.param("Features\t: fp asimd asimddp i8mm sve\n", " asimd asimddp i8mm sve", id="aarch64"),
        pytest.param("model name\t: Xeon\nflags\t\t: fpu amx_int8\nflags\t\t: avx2\n", " amx_int8", id="first-core"),
        pytest.param("processor: 0\n", "", id="unknown"),
    ],
)  # fmt: skip
def test_instruction_sets_come_from_the_system(
    cpuinfo: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    machine._instruction_sets.cache_clear()
    try:
        assert device_key(CPU) == f"cpu: {device_name(CPU)}{ending}"
    finally:
        machine._instruction_sets.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "flags", "bits"),
    [
        ("x86_64", ("avx2", "fma"), 7), ("AMD64", ("avx2", "avx512f", "avx512bw"), 7), ("x86_64", (), 7),
        ("x86_64", ("avx2", "avx512f", "avx512_vnni"), 8), ("x86_64", ("avx2", "avx_vnni"), 8),
        ("aarch64", ("asimd",), 8),
    ],
    ids=["AVX2", "AVX-512 before VNNI", "unknown", "AVX-512 with VNNI", "AVX2 with VNNI", "not x86"],
)  # fmt: skip
def test_int8_weights_have_the_bits_that_the_processor_adds_up(
    architecture: str, flags: tuple[str, ...], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "_instruction_sets", lambda: flags)
    assert int8_weight_bits() == bits


@pytest.mark.parametrize(
    ("flags", "arithmetic"),
    [
        (("avx2", "fma"), False), (("avx2", "avx512f", "avx512_vnni"), False), (("avx2", "avx_ne_convert"), False),
        (("avx2", "avx512f", "avx512_bf16"), True), (("avx512f", "amx_tile", "amx_bf16"), True),
        (("asimd", "bf16"), True), (("asimd",), False), ((), False),
    ],
    ids=["AVX2", "AVX-512", "conversion alone", "AVX-512 with it", "AMX", "Arm with it", "Arm", "unknown"],
)  # fmt: skip
def test_bfloat16_arithmetic_is_the_processors_own(
    flags: tuple[str, ...], arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_instruction_sets", lambda: flags)
    assert bfloat16_arithmetic() is arithmetic


def test_a_gpu_is_named_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (12, 0)}[device.index])
    assert device_key(torch.device("cuda:0")) == "sm_90"
    assert device_key(torch.device("cuda:1")) == "sm_120"


@pytest.mark.gpu
def test_this_gpu_is_named_by_its_architecture() -> None:
    major, minor = torch.cuda.get_device_capability()
    assert device_key(torch.device("cuda")) == f"sm_{major}{minor}"


def test_the_system_is_named_with_its_architecture() -> None:
    assert os_key() == f"{platform.system()} {platform.machine()}".lower()
