"""Predictions for prompts that the router has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from catimage_accel.routing.ratings import Ratings
from catimage_accel.routing.routers import Router
from catimage_accel.routing.table import ScoreTable, plain_text


@dataclass(frozen=True, eq=False)
class HeldOut:
    """``predicted`` (prompts, candidates) for the prompts of ``table``, each by a router fitted on others.

    ``fold`` (prompts,) tells which router made a row; ``kinds`` is as in ``Ratings``; ``left_out`` counts the prompts
    that were not judged since they lack a candidate.
    """

    predicted: np.ndarray
    table: ScoreTable
    fold: np.ndarray
    kinds: tuple[str, ...] | None
    left_out: int


def predict_held_out(
    router_factory: Callable[[], Router],
    table: ScoreTable | Ratings,
    *,
    folds: int = 5,
    test: ScoreTable | Ratings | None = None,
    seed: int = 0,
) -> HeldOut:
    """Fit on some prompts, predict others: by ``folds`` of the prompts, or for ``test`` from all of ``table``.

    Only prompts with all candidates are predicted. Those that lack some are learnt from in every fold that does not
    hold the same prompt out, with what is missing imputed from that fold's training prompts alone. Errors as in
    ``Ratings`` and ``ScoreTable.fold_rows``.
    """
    ratings, judged = Ratings.of(table), Ratings.of(table if test is None else test)
    complete = judged.complete()
    rows = judged.complete_rows
    kinds = None if judged.kinds is None else tuple(judged.kinds[row] for row in rows)
    left_out = len(judged) - len(rows)
    if test is not None:
        training, _ = training_for(ratings, judged)
        predicted = router_factory().fit(training.imputed()).predict(complete.prompts)
        return HeldOut(predicted, complete, np.zeros(len(rows), dtype=np.intp), kinds, left_out)
    partial = np.setdiff1d(np.arange(len(ratings)), rows)
    spelling = [plain_text(prompt) for prompt in ratings.prompts]
    predicted, fold = np.empty_like(complete.scores), np.empty(len(complete), dtype=np.intp)
    for number, (training_rows, held_out) in enumerate(complete.fold_rows(folds, seed)):
        judged_here = {spelling[row] for row in rows[held_out]}
        learnt = [row for row in partial if spelling[row] not in judged_here]
        training = ratings.select(np.sort(np.concatenate([rows[training_rows], np.array(learnt, dtype=np.intp)])))
        router = router_factory().fit(training.imputed())
        predicted[held_out] = router.predict([complete.prompts[row] for row in held_out])
        fold[held_out] = number
    return HeldOut(predicted, complete, fold, kinds, left_out)


def training_for(training: Ratings, judged: Ratings) -> tuple[Ratings, int]:
    """``training`` with the candidates of ``judged`` in their order, less the prompts that both hold; and how many.

    Prompts that differ in case, width or white space alone are the same. ValueError for other candidates, and when no
    prompts are left.
    """
    training = training.reordered(judged.candidates)
    seen = {plain_text(prompt) for prompt in judged.prompts}
    rows = [row for row, prompt in enumerate(training.prompts) if plain_text(prompt) not in seen]
    if not rows:
        raise ValueError(
            f"all {len(training)} training prompts are among the {len(judged)} test prompts, expected others"
        )
    return training.select(rows), len(training) - len(rows)
