"""What the end-to-end benchmarks are asked, and where they put what they found: a JSON file by device, and a table."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from checkout import ROOT
from device_check import write

from catimage_accel.kernels.device import device_name
from catimage_accel.kernels.tuning import device_slug

SMALL = "No CUDA device: a tiny model on the CPU stands in. It says nothing about a GPU."


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every end-to-end benchmark may be asked."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default="float16" if cuda else "float32")
    parser.add_argument("--mode", default="max-autotune", help="torch.compile's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="compiled variants too")
    parser.add_argument("--measuring", type=float, help="seconds for the rounds of a size")
    parser.add_argument("--seconds", type=float, default=540.0, help="what is not compiled by then is given up")


def about(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": device_name(device), "small_cpu_run": device.type != "cuda", "dtype": str(dtype),
        "torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%SZ"),
        "threads": torch.get_num_threads(), "command": " ".join(sys.argv[1:]),
    }  # fmt: skip


def result_folder(device: torch.device) -> Path:
    """``bench/results/<device>/``, or the folder that the environment variable OUT names."""
    slug = device_slug(device) if device.type == "cuda" else "cpu"
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "bench" / "results" / slug


def result_file(benchmark: str, device: torch.device, date: str) -> Path:
    """Of one end-to-end benchmark."""
    return result_folder(device) / f"{benchmark}-{date}.json"


def save(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All of it, atomically."""
    write(path, {"about": facts, "rows": rows})


def keep(
    path: Path, facts: dict[str, Any], rows: list[dict[str, Any]], portions: Iterable[list[dict[str, Any]]]
) -> None:
    """Adds to ``rows`` what the last portion found; what any portion found is saved at once."""
    found: list[dict[str, Any]] = []
    for found in portions:
        save(path, facts, rows + found)
    for row in found:
        print(row, flush=True)
    rows += found


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich where it is installed."""
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        print(title)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
