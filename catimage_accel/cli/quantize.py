"""``catimage quantize``: candidates in INT8 or FP8."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catimage_accel.catalog import QUALITY_FILE, Candidate, Catalog
from catimage_accel.cli.console import loading, progress_bar, results, say
from catimage_accel.cli.files import read_prompts
from catimage_accel.storage import CHECKSUMS_FILE, file_sha256, write_atomic

if TYPE_CHECKING:
    from catimage_accel.lora import UNetPart
    from catimage_accel.quantize import Quantization, QuantizationReport

FOLDER, REPORT_FILE = "quantized", "report.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def quantize(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="A catalog's folder.")],
    candidate: Annotated[
        list[str], typer.Option(help="A candidate to quantize; repeat it: those of one UNet share one quantization.")
    ],
    recipe: Annotated[str, typer.Option(help="int8, int8-smoothquant or fp8.")] = "int8",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt a line, to calibrate on; the catalog's own prompts if absent."),
    ] = None,
    number: Annotated[int, typer.Option(min=1, help="Prompts to draw with each candidate.")] = 32,
    rows: Annotated[int, typer.Option(min=4, help="UNet inputs to keep of each candidate; a quarter measures.")] = 128,
    budget: Annotated[
        float, typer.Option(min=0, max=1, help="The share of multiply-adds that may stay in high precision.")
    ] = 0.05,
    percentile: Annotated[
        float | None,
        typer.Option(min=50, max=100, help="Clip activations beyond it: 99.999 if absent, and 100, so none, for fp8."),
    ] = None,
    outputs: Annotated[bool, typer.Option(help="Round outputs, too, so that engines pass integers on.")] = True,
    out: Annotated[str | None, typer.Option(help="Name of the folder under quantized/; UNet-RECIPE if absent.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a CUDA device where there is one.")] = None,
) -> None:
    """Quantize candidates' UNets with NVIDIA ModelOpt, calibrated on what they are given as they draw real prompts.

    Writes the scales and a report under the catalog's quantized/ and adds, or replaces, a candidate NAME-int8 (or
    NAME-fp8) for every NAME. The layers whose rounding harms the UNet's output most for their multiply-adds stay in
    high precision.
    """
    loaded = Catalog.load(catalog, verify=False)
    with loading("ModelOpt"):
        from catimage_accel.arguments import find_device
        from catimage_accel.quantize.modelopt import load_modelopt
        from catimage_accel.quantize.recipes import find_recipe

        format = find_recipe(recipe).format
        found = find_device(device)
        groups = _groups(loaded, [loaded.candidate(name) for name in dict.fromkeys(candidate)])
        if out is not None and not _NAME.fullmatch(out):
            raise ValueError(f"out is {out!r}; accepted: letters, digits, '_', '.', '+' and '-'")
        if out is not None and len(groups) > 1:
            raise ValueError(
                f"out is {out!r}, but the candidates have {len(groups)} UNets; accepted: one UNet, or no --out"
            )
        texts = _prompts(loaded, prompts, number)
        load_modelopt()
    options = {"recipe": recipe, "percentile": percentile, "outputs": outputs, "budget": budget}
    made = [_quantized(loaded, some, texts, rows, str(found), options) for some in groups]
    for some, (quantization, report) in zip(groups, made, strict=True):
        folder = f"{FOLDER}/{out or _folder_name(loaded, some[0], recipe)}"
        names = {f"{one.name}-{format}" for one in some}
        if others := [one.name for one in loaded.candidates if one.quantization == folder and one.name not in names]:
            say(f"{folder} has new scales, with which {', '.join(others)} draws too: profile and gate it again")
        _write(loaded.folder / folder, quantization, report)
        results().print(report.table(f"{some[0].unet}, {recipe}"))
        say(
            f"{report.quantized_share:.1%} of the multiply-adds in {format}; relative squared error of the output "
            f"{report.output_error:.2e} on {report.held_out_rows} inputs it was not calibrated on "
            f"({report.calibrated_error:.2e} with every layer in {format})"
        )
        for one in some:
            name = f"{one.name}-{format}"
            loaded = _with(
                loaded, replace(one, name=name, engine="auto", precision=format, quantization=folder), one
            )  # fmt: skip
            say(f"candidate {name}: {folder}")
    loaded.save(loaded.folder)
    if (loaded.folder / CHECKSUMS_FILE).exists():
        loaded.write_checksums()
    say(f"measure the new candidates with `catimage profile {loaded.folder}`, then fit the router again")


def _quantized(
    catalog: Catalog, candidates: Sequence[Candidate], prompts: Sequence[str], rows: int, device: str,
    options: dict[str, Any],
) -> tuple[Quantization, QuantizationReport]:  # fmt: skip
    """One quantization for candidates of one UNet."""
    import torch

    from catimage_accel.calibration import record_inputs
    from catimage_accel.engines.loading import load_unet
    from catimage_accel.quantize import UNetInputs, check_checkpoint, quantize_unet, weights_sha256

    first = candidates[0]
    model = catalog.resolve_model(first.model)
    check_checkpoint(model, first.unet)
    source = first.unet_part(catalog.resolve_lora)
    with progress_bar() as progress:
        bar = progress.add_task(f"recording {first.unet}", total=len(candidates) * len(prompts))
        inputs = UNetInputs.joined([
            record_inputs(
                one, prompts, rows, device=device, resolve_model=catalog.resolve_model,
                resolve_lora=catalog.resolve_lora, advance=lambda images: progress.advance(bar, images),
            )
            for one in candidates
        ])  # fmt: skip
        unet = load_unet(model, source, torch.float32).to(device)
        work = progress.add_task(f"quantizing {first.unet}", total=None)
        calibration = {
            "candidates": [one.name for one in candidates], "prompts": len(prompts),
            "steps": [one.steps for one in candidates], "samples": len(inputs),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest(),
        }  # fmt: skip
        return quantize_unet(
            unet, inputs, source_sha256=weights_sha256(model, source), calibration=calibration,
            advance=lambda done, total: progress.update(work, completed=done, total=total), **options,
        )  # fmt: skip


def _groups(catalog: Catalog, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates by UNet."""
    groups: dict[tuple[Path, UNetPart], list[Candidate]] = {}
    for one in candidates:
        if one.quantization is not None:
            raise ValueError(f"candidate {one.name!r} is quantized; accepted: the one it was made from")
        key = (catalog.resolve_model(one.model).resolve(), one.unet_part(catalog.resolve_lora))
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _prompts(catalog: Catalog, file: Path | None, number: int) -> list[str]:
    """``number`` prompts of the file, or of the catalog's scores; which, depends on the prompts alone."""
    if file is not None:
        texts, problems = read_prompts(file)
        for problem in problems:
            say(problem)
        source = f"prompts is {str(file)!r}"
    else:
        import pyarrow.parquet

        path = catalog.folder / QUALITY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so there are no prompts to calibrate on; give --prompts FILE")
        texts = pyarrow.parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()
        source = str(path)
    texts = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    if not texts:
        raise ValueError(f"{source}, which has no prompts; accepted: 1 or more to calibrate on, one a line")
    return texts[:number]


def _folder_name(catalog: Catalog, candidate: Candidate, recipe: str) -> str:
    """UNet-RECIPE, with the model's name before it where the catalog has several models, and a LoRA's after it."""
    own = catalog.resolve_model(candidate.model).resolve()
    others = {folder for one in catalog.candidates if (folder := catalog.resolve_model(one.model).resolve()) != own}
    model = f"{_plain(Path(candidate.model).name)}-" if others else ""
    if own.name in {folder.name for folder in others}:
        model += f"{hashlib.sha256(candidate.model.encode()).hexdigest()[:8]}-"
    lora = ""
    if candidate.lora is not None:
        file = catalog.resolve_lora(candidate.lora)  # many are called alike
        lora = f"-{_plain(file.stem)}-{file_sha256(file)[:8]}-{candidate.lora_scale:g}"
    return f"{model}{candidate.unet}{lora}-{recipe}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)


def _with(catalog: Catalog, added: Candidate, source: Candidate) -> Catalog:
    """``catalog`` with the candidate in the place of one of its name, or at the end; it costs as many FLOPs."""
    candidates = [added if one.name == added.name else one for one in catalog.candidates]
    if added not in candidates:
        candidates.append(added)
    flops = dict(catalog.flops)
    if source.name in flops:
        flops[added.name] = flops[source.name]
    return replace(catalog, candidates=tuple(candidates), flops=flops)


def _write(folder: Path, quantization: Quantization, report: QuantizationReport) -> None:
    """The three files as a new folder that takes the old one's place, whole."""
    mark = uuid.uuid4().hex[:8]
    made, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        quantization.save(made)
        write_atomic(made / REPORT_FILE, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
        if folder.exists():
            folder.rename(old)
        try:
            made.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
