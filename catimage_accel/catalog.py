"""Candidates, and the folder that describes a set of them: catalog.toml, costs.json, quality.parquet, router/."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tomli_w
from pydantic import Field

from catimage_accel.candidate import LATER_FIELDS, OWN_VAE, Candidate, CandidateFields, Name
from catimage_accel.costs import COST_NAMES, CostUnit, Milliseconds, ranked_engines
from catimage_accel.hub import HUB_ID, LORA_FILE, download, download_file, download_model, hub_lora
from catimage_accel.storage import (
    Strict,
    read_json,
    read_toml,
    validated,
    verify_files,
    write_atomic,
    write_checksums,
)

if TYPE_CHECKING:
    from catimage_accel.routing import Ratings, Router, ScoreTable

BUILT_IN = "emoji"
CATALOG_FILE, COSTS_FILE, QUALITY_FILE = "catalog.toml", "costs.json", "quality.parquet"


class _CatalogFields(Strict):
    name: Name
    metric: Name = "clip_score"
    judge: Annotated[str, Field(min_length=1)] | None = None
    tradeoff: Annotated[float, Field(ge=0)] = 0.0
    cost: CostUnit = "gflop"
    cost_device: Annotated[str, Field(min_length=1)] | None = None
    candidate: Annotated[list[CandidateFields], Field(min_length=1)]


class _CostFields(Strict):
    flops: dict[str, Annotated[int, Field(gt=0)]]
    milliseconds: Milliseconds = Field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """A set of candidates with what was measured of them, and the folder that holds it.

    ``flops`` is floating-point operations an image (text encoder, guidance, all steps and the decode) and
    ``milliseconds`` [device][engine][candidate][batch size] the time an image; both empty before `catimage profile`.
    ``judge`` is the CLIP that scores pictures by ``metric``: a folder, relative to ``folder`` or absolute, or a hub id.
    ``tradeoff`` is what routing uses unless told otherwise: the quality, in the metric's unit, that one gives up to
    save the dearest candidate's cost. ``cost`` is what routing weighs: "gflop", or "milliseconds", those measured on
    ``cost_device`` with the engine that is the fastest there for the candidate's UNet, at the largest batch size.
    """

    folder: Path
    name: str
    candidates: tuple[Candidate, ...]
    metric: str = "clip_score"
    judge: str | None = None
    tradeoff: float = 0.0
    cost: CostUnit = "gflop"
    cost_device: str | None = None
    flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    milliseconds: Milliseconds = field(default_factory=dict, hash=False)
    _downloaded: dict[str, Path] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if not names:
            raise ValueError(f"catalog {self.name!r} has no candidates; at least 1 is needed")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"candidate name {name!r} occurs {names.count(name)} times; names must differ")
        if (self.cost == "milliseconds") != (self.cost_device is not None):
            raise ValueError(
                f"catalog {self.name!r}: cost is {self.cost!r} and cost_device {self.cost_device!r}; accepted: "
                "milliseconds with the device they were measured on, gflop without"
            )

    @classmethod
    def load(cls, source: str | os.PathLike[str] = BUILT_IN, *, verify: bool = True) -> Catalog:
        """The catalog in a folder, of a hub id, or the built-in "emoji".

        Everything that can be checked without loading weights is: unknown keys, values out of range, missing files
        and, unless ``verify`` is False, the checksums. Raises FileNotFoundError or ValueError, one line each.
        """
        folder = _find_folder(source)
        path = folder / CATALOG_FILE
        values = read_toml(path, f"a catalog is a folder with {CATALOG_FILE}")
        if verify:
            verify_files(folder)
        fields = validated(_CatalogFields, values, str(path))
        costs = _CostFields(flops={})
        if (folder / COSTS_FILE).exists():
            costs = validated(_CostFields, read_json(folder / COSTS_FILE), str(folder / COSTS_FILE))
        try:
            catalog = cls(
                folder, fields.name,
                tuple(Candidate(**entry.model_dump(exclude_none=True)) for entry in fields.candidate),
                fields.metric, fields.judge, fields.tradeoff, fields.cost, fields.cost_device, costs.flops,
                costs.milliseconds,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for candidate in catalog.candidates:
            if candidate.lora is not None and hub_lora(candidate.lora) is None:
                catalog.resolve_lora(candidate.lora)
            if not HUB_ID.fullmatch(candidate.model) or (folder / candidate.model).is_dir():
                catalog.resolve_model(candidate.model)
                for part in ("unet", *(("vae",) if candidate.vae != OWN_VAE else ())):
                    name = getattr(candidate, part)
                    _require(folder / candidate.model / name / "config.json", path, candidate.name, part, name)
        if catalog.judge is not None and (not HUB_ID.fullmatch(catalog.judge) or (folder / catalog.judge).is_dir()):
            _require(folder / catalog.judge / "config.json", path, catalog.name, "judge", catalog.judge)
        return catalog

    @property
    def costs(self) -> dict[str, float]:
        """Candidate name -> what an image costs, in GFLOP or milliseconds: what routing weighs and ``budget`` is in."""
        if self.cost_device is not None:
            times = self.milliseconds.get(self.cost_device, {})
            by_batch = {
                one.name: times.get(self.engines_for(one, self.cost_device)[0], {}).get(one.name, {})
                for one in self.candidates
            }
            found = {name: sizes[max(sizes, key=int)] for name, sizes in by_batch.items() if sizes}
            what, how = f"milliseconds of {self.cost_device}", "catimage engine tune"
        else:
            found = {name: flops / 1e9 for name, flops in self.flops.items()}
            what, how = "flops", "catimage profile"
        missing = [candidate.name for candidate in self.candidates if candidate.name not in found]
        if missing:
            raise ValueError(
                f"{self.folder / COSTS_FILE} has no {what} for {', '.join(missing)}; "
                f"measure them with `{how} {self.folder}`"
            )
        return {candidate.name: found[candidate.name] for candidate in self.candidates}

    @property
    def cost_unit(self) -> str:
        """The unit of ``costs``: "GFLOP" or "ms"."""
        return COST_NAMES[self.cost]

    def engines_for(self, candidate: Candidate, device: str) -> tuple[str, ...]:
        """The engines to run ``candidate`` with, best first: its own, or as measured on ``device``.

        Measured of the candidates with its weights, or else of those in its precision.
        """
        if candidate.engine != "auto":
            return (candidate.engine,)
        same_weights = [one.name for one in self.candidates if one.weights == candidate.weights]
        same_precision = [one.name for one in self.candidates if one.precision == candidate.precision]
        return (
            ranked_engines(self.milliseconds, device, same_weights)
            or ranked_engines(self.milliseconds, device, same_precision)
            or ("eager",)
        )

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name; ValueError lists the names there are."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        names = ", ".join(candidate.name for candidate in self.candidates)
        raise ValueError(f"candidate is {name!r}; catalog {self.name!r} has {names}")

    def resolve_model(self, model: str) -> Path:
        """The folder of a candidate's ``model``; a hub id is downloaded (what is needed of it, no pickles), once."""
        folder = self.folder / model
        if folder.is_dir():
            return folder
        if not HUB_ID.fullmatch(model):
            raise FileNotFoundError(
                f"{self.folder / CATALOG_FILE}: model is {model!r}, but {folder} is not a folder; "
                "accepted: a diffusers folder (relative to the catalog, or absolute) or a hub id"
            )
        return self._from_hub(model, self._parts_of(model))

    def resolve_lora(self, lora: str) -> Path:
        """The file of a candidate's ``lora``, or in the folder that it names; one on the hub is downloaded, once."""
        file = self.folder / lora
        if file.is_dir():
            file /= LORA_FILE
        if file.is_file():
            return file
        found = hub_lora(lora)
        if found is None or file.parent.is_dir():
            raise FileNotFoundError(
                f"{self.folder / CATALOG_FILE}: lora is {lora!r}, but {file} is not a file; accepted: a .safetensors "
                "file (relative to the catalog, or absolute), a hub id, or owner/name/file.safetensors on the hub"
            )
        if lora not in self._downloaded:
            self._downloaded[lora] = download_file(*found)
        return self._downloaded[lora]

    def _from_hub(self, repository: str, parts: Sequence[str] = ()) -> Path:
        # The hub would be asked whether there is something newer: that takes a while, and changes models in use.
        if repository not in self._downloaded:
            self._downloaded[repository] = download_model(repository, parts) if parts else download(repository)
        return self._downloaded[repository]

    def _parts_of(self, model: str) -> list[str]:
        """The subfolders of ``model`` whose weights its candidates need."""
        mine = [one for one in self.candidates if one.model == model]
        own = {part for one in mine for part in (one.unet, one.vae)}
        return sorted({"text_encoder", "text_encoder_2", OWN_VAE} | own)

    @property
    def judge_folder(self) -> Path:
        """The judge's folder; a hub id is downloaded. ValueError if the catalog names none."""
        if self.judge is None:
            raise ValueError(f"{self.folder / CATALOG_FILE}: judge is missing; name a CLIP folder or a hub id")
        folder = self.folder / self.judge
        return self._from_hub(self.judge) if HUB_ID.fullmatch(self.judge) and not folder.is_dir() else folder

    def quality_table(self) -> ScoreTable:
        """The measured scores, mean over seeds, in this catalog's metric; ValueError when a pair is missing."""

        return self.ratings().whole(self._quality_path())

    def ratings(self) -> Ratings:
        """As ``quality_table``, but pairs may be missing."""
        from catimage_accel.routing import read_parquet

        return read_parquet(self._quality_path(), self.costs, self.metric)

    def mean_scores(self) -> dict[str, float]:
        """Candidate -> the mean over its profiled prompts, of candidates that have any; errors as ``ratings``'."""
        from catimage_accel.routing import mean_scores

        found = mean_scores(self._quality_path(), self.metric)
        return {candidate.name: found[candidate.name] for candidate in self.candidates if candidate.name in found}

    def _quality_path(self) -> Path:
        path = self.folder / QUALITY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; make it with `catimage profile {self.folder} --prompts FILE`")
        return path

    def router(self) -> Router:
        """The router fitted on this catalog."""
        from catimage_accel.routing import load_router

        folder = self.folder / "router"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; fit a router with `catimage router fit {self.folder}`")
        return load_router(folder, candidates=[candidate.name for candidate in self.candidates])

    def save(self, folder: str | os.PathLike[str]) -> Catalog:
        """Writes catalog.toml and costs.json into ``folder``; relative paths then point back to the old folder."""
        folder = Path(folder).absolute()
        moved = folder != self.folder.absolute()

        def place(path: str) -> str:
            there = self.folder / path
            return str(there.absolute()) if moved and there.exists() else path

        copy = replace(
            self, folder=folder, judge=None if self.judge is None else place(self.judge),
            candidates=tuple(
                replace(
                    candidate, model=place(candidate.model),
                    lora=None if candidate.lora is None else place(candidate.lora),
                    quantization=None if candidate.quantization is None else place(candidate.quantization),
                )
                for candidate in self.candidates
            ),
        )  # fmt: skip
        header = {key: getattr(copy, key) for key in ("name", "metric", "judge", "tradeoff", "cost", "cost_device")}
        header = {key: value for key, value in header.items() if value not in (None, "gflop")}
        entries = [
            {key: value for key, value in asdict(one).items() if value not in ({}, None, LATER_FIELDS.get(key))}
            for one in copy.candidates
        ]
        write_atomic(folder / CATALOG_FILE, tomli_w.dumps({**header, "candidate": entries}).encode())
        if copy.flops:
            costs = {"flops": dict(copy.flops), "milliseconds": copy.milliseconds}
            write_atomic(folder / COSTS_FILE, (json.dumps(costs, indent=1) + "\n").encode())
        return copy

    def verify(self) -> None:
        """Compares every file with checksums.json; raises FileNotFoundError or ValueError naming the first bad one."""
        verify_files(self.folder)

    def write_checksums(self) -> None:
        """Lists size and sha256 of every file of the folder in checksums.json."""
        write_checksums(self.folder)


def built_in_folder() -> Path:
    """The folder of the built-in catalog."""
    return Path(__file__).parent / "zoo" / BUILT_IN


def _find_folder(source: str | os.PathLike[str]) -> Path:
    if not isinstance(source, (str, os.PathLike)) or source == "":
        raise ValueError(f"catalog is {source!r}; accepted: a folder, a hub id, or {BUILT_IN!r}")
    if source == BUILT_IN:
        return built_in_folder()
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not folder.exists():
        return download(source)
    raise FileNotFoundError(
        f"catalog is {str(source)!r}, which is not a folder; accepted: a folder, a hub id, or {BUILT_IN!r}"
    )


def _require(file: Path, catalog: Path, owner: str, name: str, value: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{catalog}: {owner}: {name} is {value!r}, but {file} is missing")
