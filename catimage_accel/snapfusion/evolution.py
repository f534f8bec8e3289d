"""A whole architecture run: latencies, robust training, rounds of the search, the efficient UNet that comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.progress import Progress

from catimage_accel.efficient_unet import removable_blocks, repeatable_blocks, with_repeats
from catimage_accel.snapfusion.latency import LatencyTable, Stopwatch, measure_latencies
from catimage_accel.snapfusion.losses import DenoisingLoss, denoiser_of
from catimage_accel.snapfusion.preview import Preview
from catimage_accel.snapfusion.recipes import ArchitectureRecipe, Search, Validation, read_recipe
from catimage_accel.snapfusion.robust import OptionalBlock, leaving_out, only, optional_blocks, plain_name
from catimage_accel.snapfusion.run import Run
from catimage_accel.snapfusion.search import SearchState, check_target, evolve_once
from catimage_accel.training.loop import Trainer
from catimage_accel.training.process import check_alone
from catimage_accel.training.record import run_record

STATE_FILE = "search.json"


def search_architecture(path: Path, work: Path, device: torch.device, steps: int | None = None) -> Path:
    """Run the architecture recipe ``path``, or go on where it was stopped; returns the efficient UNet's folder.

    Its weights are those of robust training: train it on with ``finetune``. Raises UnreachableTarget, before any
    training, for a target that no network meets, and ValueError in one of several processes.
    """
    recipe = read_recipe(path, ArchitectureRecipe)
    check_alone("distill architecture")
    run = Run(path, work, device, recipe.model, recipe.training.precision_on(device))
    wanted = recipe.search
    unet = run.unet(recipe.student)
    removable, repeatable = removable_blocks(unet), repeatable_blocks(unet)
    told: dict[str, Any] = recipe.model_dump(exclude={"training"})
    told |= {"student weights": run.digest(recipe.student)}
    run.folder.mkdir(parents=True, exist_ok=True)
    with Stopwatch(run.model, wanted.engine, wanted.rows, device) as stopwatch:
        state = _begin(run, told, unet, removable, stopwatch)
        target = state.table.whole / wanted.speedup
        check_target(state.table, target, removable)
        whole, plain = stopwatch.call(unet), copy.deepcopy(unet)

        def measure(repeats: Mapping[str, int]) -> float:
            return state.table.whole / stopwatch.compare(whole, stopwatch.call(with_repeats(plain, repeats)))[1]

        loss = DenoisingLoss(
            run.source(recipe.data), run.text, run.schedule, recipe.training.batch_size, recipe.caption_dropout
        )
        preview = run.preview(Validation(prompts=wanted.prompt_file, number=wanted.prompts, judge=wanted.judge))
        with optional_blocks(unet, removable) as blocks:
            trainer = _robust_training(run, recipe, unet, blocks, state, loss, told, steps)
            while not state.done:
                with trainer.averaged():
                    scorer = _Scorer(preview, unet, run.dtype, blocks, wanted)
                    _round(state, recipe.search, scorer, repeatable, measure, target)
                state.write(run.folder / STATE_FILE)
                trainer = _robust_training(run, recipe, unet, blocks, state, loss, told, steps)
            weights = {plain_name(name): value for name, value in trainer.ema_state().items()}
        unet.float().load_state_dict(weights)
        found = with_repeats(unet, state.repeats)
        milliseconds, faster = stopwatch.compare(whole, stopwatch.call(found))
    facts = told | run_record(run.folder, trainer.config, device) | {"search": asdict(state)}
    facts |= {"milliseconds": milliseconds, "times as fast": faster}
    return run.write(found, facts)


def _begin(run: Run, told: dict[str, Any], unet: Any, removable: list[str], stopwatch: Stopwatch) -> SearchState:
    """The state to go on from, or that of a new search."""
    path = run.folder / STATE_FILE
    if path.exists():
        return SearchState.read(path, told)
    with Progress() as progress:
        bar = progress.add_task("latencies", total=len(removable))
        table: LatencyTable = measure_latencies(unet, removable, stopwatch, lambda done: progress.advance(bar, done))
    state = SearchState(told, table, 0.0)
    state.write(path)
    return state


def _robust_training(
    run: Run,
    recipe: ArchitectureRecipe,
    unet: UNet2DConditionModel,
    blocks: dict[str, OptionalBlock],
    state: SearchState,
    loss: DenoisingLoss,
    told: dict[str, Any],
    steps: int | None,
) -> Trainer:
    """Trains the blocks that are left, up to where the rounds so far call for."""
    first = recipe.training.steps if steps is None else steps
    config = recipe.training.config(run.device, 0, first + len(state.rounds) * recipe.search.steps_between)
    recorded = told | {"source": loss.source.name}
    trainer = Trainer(unet, config, run.folder, run.device, run.path.stem, recipe=recorded, some_unused=True)
    denoiser = denoiser_of(trainer.forward, run.dtype)
    active = {path: block for path, block in blocks.items() if path not in state.left_out}
    low, high = recipe.keep
    with only(blocks, active):
        trainer.run(leaving_out(active, (low, high), lambda generator: loss(denoiser, generator)))
    return trainer


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The mean CLIPScore of the network with some of its optional blocks."""

    preview: Preview
    unet: UNet2DConditionModel
    dtype: torch.dtype
    blocks: dict[str, OptionalBlock]
    wanted: Search

    def __call__(self, active: Sequence[str]) -> float:
        with only(self.blocks, active):
            return self.preview.score(
                denoiser_of(self.unet, self.dtype), self.wanted.steps, self.wanted.guidance_scale
            )


def _round(
    state: SearchState,
    wanted: Search,
    score: _Scorer,
    repeatable: Sequence[str],
    measure: Callable[[Mapping[str, int]], float],
    target: float,
) -> None:
    active = [path for path in score.blocks if path not in state.left_out]
    with Progress() as progress:
        bar = progress.add_task(f"round {len(state.rounds) + 1}", total=len(active))
        if not state.rounds:
            state.whole_score = score(active)
        evolve_once(
            state, score, active, repeatable, measure, target, wanted.saving * state.table.whole,
            wanted.additions, lambda done: progress.advance(bar, done),
        )  # fmt: skip
