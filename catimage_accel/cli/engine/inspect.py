"""``catimage engine inspect``: everything that is known of one built engine."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from catimage_accel.cli.console import say
from catimage_accel.cli.engine.entries import described, open_cache
from catimage_accel.cli.engine.graphs import describe_graph, read_layers
from catimage_accel.cli.engine.tables import print_table


def inspect(
    digest: Annotated[str, typer.Argument(help="The first characters of the engine's digest, as `list` shows it.")],
) -> None:
    """Show one built engine: what it was built for, its files, and what its graph or its layers are made of."""
    from catimage_accel.engines.cache_entry import read_record

    entries = [entry for entry in open_cache().entries() if digest and entry.key.digest.startswith(digest.lower())]
    if len(entries) != 1:
        found = f"that of {len(entries) or 'no'} engine{'s' if entries else ''}"
        raise ValueError(f"digest is {digest!r}, {found}; accepted: the start of one that `catimage engine list` shows")
    entry = entries[0]
    print_table(str(entry.folder), ("", ""), (
        (name, "; ".join(f"{key}={text}" for key, text in value.items()) if isinstance(value, dict) else str(value))
        for name, value in described(entry, datetime.now(UTC)).items()
    ))  # fmt: skip
    files = read_record(entry.folder).files
    rows = [(name, str(file.size), file.sha256) for name, file in files.items()]
    print_table("files", ("file", "bytes", "sha256"), rows, numbers=("bytes",))
    for name in files:
        if name.endswith(".onnx"):
            _show_graph(entry.folder / name)
        elif name.endswith(".json"):
            _show_layers(entry.folder / name)


def _show_graph(path: Path) -> None:
    try:
        graph = describe_graph(path)
    except ImportError:
        say(f"{path.name} is not looked into, for onnx is not installed; pip install 'catimage-accel[onnx]'")
        return
    operators = graph.operators
    print_table(
        f"{path.name}: {operators.total()} nodes; {operators['QuantizeLinear']} QuantizeLinear, "
        f"{operators['DequantizeLinear']} DequantizeLinear",
        ("operator", "nodes"), [(name, str(number)) for name, number in operators.most_common()], numbers=("nodes",),
    )  # fmt: skip
    print_table(f"{path.name}: inputs and outputs", ("", "name", "type", "shape"), graph.tensors)


def _show_layers(path: Path) -> None:
    if layers := read_layers(path):
        precisions = Counter(f"{layer.inputs} -> {layer.outputs}" for layer in layers).most_common()
        title = f"{path.name}: {len(layers)} layers: " + "; ".join(f"{number} {kind}" for kind, number in precisions)
        rows = [(layer.name, layer.kind, layer.inputs, layer.outputs) for layer in layers]
        print_table(title, ("layer", "type", "inputs", "outputs"), rows)
