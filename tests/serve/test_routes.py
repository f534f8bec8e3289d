"""A request's candidate, held to load, deadline and what can be drawn with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from catimage_accel.catalog import Catalog
from catimage_accel.choosing import Policy
from catimage_accel.serve.routes import Choice, Routes

# What costs 1, 3 and 8: quality is worth having, the dearer the better.
PREDICTED = {"cheap-2": 0.20, "middle-3": 0.26, "dear-4": 0.30}


@pytest.fixture(scope="module")
def routes(tiny_catalog: Path) -> Routes:
    return Routes(Catalog.load(tiny_catalog))


def choice(routes: Routes, name: str, **more: object) -> Choice:
    return Choice(routes.catalog.candidate(name), **{"reason": "tradeoff", "tradeoff": 0.05, **more})  # type: ignore[arg-type]


def test_the_policy_alone_chooses_as_the_pipeline_does(routes: Routes) -> None:
    found, predicted = routes.choose("a dog", Policy(tradeoff=0.0))
    assert found.candidate.name == max(predicted, key=lambda name: (predicted[name], -routes.costs[name]))
    assert (found.reason, found.tradeoff) == ("tradeoff", 0.0)
    found, _ = routes.choose("a dog", Policy(candidate="middle-3"))
    assert (found.candidate.name, found.reason, found.tradeoff) == ("middle-3", "candidate", None)


def test_nothing_changes_when_nothing_asks_for_it(routes: Routes) -> None:
    first = choice(routes, "dear-4")
    assert routes.adjust(first, PREDICTED) is first


@pytest.mark.parametrize(
    ("raised", "name"), [(0.05, "dear-4"), (0.1, "middle-3"), (1.0, "cheap-2")],
    ids=["as-asked-for", "some-pressure", "much-pressure"],
)  # fmt: skip
def test_load_makes_routes_cheaper(routes: Routes, raised: float, name: str) -> None:
    found = routes.adjust(choice(routes, "dear-4"), PREDICTED, pressure=lambda asked: max(asked, raised))
    assert found.candidate.name == name
    if name != "dear-4":
        assert (found.reason, found.tradeoff) == ("load", raised)


def test_the_greatest_number_is_a_tradeoff(routes: Routes) -> None:
    first = choice(routes, "cheap-2", tradeoff=sys.float_info.max)
    assert routes.adjust(first, PREDICTED) is first


def test_load_never_makes_a_budget_dearer(routes: Routes) -> None:
    first = choice(routes, "cheap-2", reason="budget", tradeoff=None)
    assert routes.adjust(first, PREDICTED, pressure=lambda _: 0.01).candidate.name == "cheap-2"
    dear = choice(routes, "dear-4", reason="budget", tradeoff=None)
    assert routes.adjust(dear, PREDICTED, pressure=lambda _: 1.0).candidate.name == "cheap-2"


def test_load_leaves_a_minimum_quality_and_a_named_candidate_alone(routes: Routes) -> None:
    for reason in ("min_quality", "candidate"):
        first = choice(routes, "dear-4", reason=reason, tradeoff=None)
        assert routes.adjust(first, PREDICTED, pressure=lambda _: 10.0) is first


@pytest.mark.parametrize(
    ("left", "name"), [(8.0, "dear-4"), (4.0, "middle-3"), (0.5, "cheap-2")],
    ids=["all-are-in-time", "the-best-that-is-in-time", "none-is-so-the-quickest"],
)  # fmt: skip
def test_a_deadline_leaves_what_is_in_time(routes: Routes, left: float, name: str) -> None:
    seconds = {"cheap-2": 1.0, "middle-3": 3.0, "dear-4": 8.0}
    found = routes.adjust(choice(routes, "dear-4"), PREDICTED, seconds_left=left, seconds=seconds)
    assert found.candidate.name == name
    assert found.reason == ("tradeoff" if name == "dear-4" else "deadline")


def test_a_candidate_that_cannot_be_had_is_replaced(routes: Routes) -> None:
    found = routes.adjust(choice(routes, "dear-4"), PREDICTED, without={"dear-4"})
    assert (found.candidate.name, found.reason) == ("middle-3", "retry")
    named = choice(routes, "dear-4", reason="candidate", tradeoff=None)
    assert routes.adjust(named, PREDICTED, without={"dear-4"}) is named


def test_the_next_cheaper(routes: Routes) -> None:
    cheaper = routes.cheaper_than("dear-4", ())
    assert cheaper is not None
    assert cheaper.name == "middle-3"
    skipped = routes.cheaper_than("dear-4", {"middle-3"})
    assert skipped is not None
    assert skipped.name == "cheap-2"
    assert routes.cheaper_than("cheap-2", ()) is None


def test_at_the_greatest_tradeoff_nearly_all_is_drawn_by_the_cheapest(routes: Routes) -> None:
    prompts = routes.catalog.ratings().prompts
    names = [routes.choose(prompt, Policy(tradeoff=routes.max_tradeoff))[0].candidate.name for prompt in prompts]
    assert names.count("cheap-2") >= 0.9 * len(names)


def test_a_catalog_without_a_router_draws_with_named_candidates_only(tiny_catalog: Path, tmp_path: Path) -> None:
    bare = Catalog.load(tiny_catalog).save(tmp_path)
    routes = Routes(bare)
    assert routes.choose("a dog", Policy(candidate="cheap-2"))[0].candidate.name == "cheap-2"
    with pytest.raises(ValueError, match="no router; name a candidate: cheap-2"):
        routes.choose("a dog", Policy())


@pytest.mark.parametrize(
    ("policy", "without", "name"),
    [
        (Policy(tradeoff=0.0), {"cheap-2"}, "dear-4"),
        (Policy(tradeoff=0.0), {"dear-4"}, "middle-3"),
        (Policy(tradeoff=10.0), {"cheap-2"}, "middle-3"),
        (Policy(budget=8.0), {"dear-4"}, "middle-3"),
        (Policy(min_quality=0.0), {"cheap-2"}, "middle-3"),
        (Policy(candidate="dear-4"), {"cheap-2", "middle-3"}, "dear-4"),
    ],
    ids=["the-choice-is-there", "the-best-is-not", "nor-the-cheapest", "in-a-budget", "of-a-quality", "named"],
)
def test_the_policy_chooses_among_those_that_can_draw_it(
    routes: Routes, policy: Policy, without: set[str], name: str
) -> None:
    found, _ = routes.choose("a dog, a cat and three crowns", policy, without)
    assert found.candidate.name == name
    assert found.reason in ("tradeoff", "budget", "min_quality", "candidate")


def test_a_budget_for_none_of_those_that_can_draw_it_is_refused(routes: Routes) -> None:
    with pytest.raises(ValueError, match=r"budget is 2\.0; accepted: a finite number of at least 3 GFLOP"):
        routes.choose("a dog", Policy(budget=2.0), {"cheap-2"})
