"""The search's rounds on score functions and latencies that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel.snapfusion.latency import LatencyTable
from catimage_accel.snapfusion.search import SearchState, UnreachableTarget, check_target, evolve_once

BLOCKS = {"a": 4.0, "b": 4.0, "c": 1.0, "d": 2.0}
WORTH = {"a": 0.01, "b": 0.2, "c": 0.001, "d": 0.1}


def begun(blocks: dict[str, float], whole: float) -> SearchState:
    return SearchState({"seed": 0}, LatencyTable("eager", "test", 8, whole, blocks), 1.0)


def evolve(
    state: SearchState, worth: dict[str, float], target: float, *, saving: float = 2.0, additions: int = 0
) -> None:
    """Rounds to the end; the network takes what the table says, and scores the sum of its blocks' worth."""
    for _ in range(100):
        if state.done:
            return
        active = [path for path in state.table.blocks if path not in state.left_out]
        evolve_once(
            state, lambda names: sum(worth[name] for name in names), active, list(state.table.blocks),
            state.table.of, target, saving, additions,
        )  # fmt: skip
    raise AssertionError("the search does not end")


def test_what_is_worth_least_for_its_time_goes_first() -> None:
    state = begun(BLOCKS, 20.0)
    evolve(state, WORTH, target=15.0)
    assert state.left_out == ["c", "a"]  # 0.001 and 0.0025 a millisecond; d and b are worth 0.05 each
    assert [[one["block"] for one in past["actions"]] for past in state.rounds] == [["c", "a"], []]
    assert state.rounds[-1]["milliseconds"] == 15.0


def test_a_round_saves_no_more_than_asked_for() -> None:
    state = begun(BLOCKS, 20.0)
    evolve(state, WORTH, target=15.0, saving=1.0)
    assert [[one["block"] for one in past["actions"]] for past in state.rounds] == [["c"], ["a"], []]


def test_room_left_is_spent_on_what_is_worth_most() -> None:
    state = begun(BLOCKS, 20.0)
    evolve(state, WORTH, target=19.5, additions=1)
    assert (state.left_out, state.copied) == (["c"], [])  # half a millisecond holds nothing
    state = begun(BLOCKS | {"d": 0.4}, 20.0)
    evolve(state, WORTH, target=19.5, additions=1)
    assert (state.left_out, state.copied) == (["c"], ["d"])


def test_a_block_that_was_left_out_comes_back_where_there_is_room() -> None:
    state = begun({"a": 4.0, "b": 3.0, "c": 1.0}, 20.0)
    evolve(state, {"a": 0.1, "b": 0.2, "c": 0.02}, target=16.5, saving=5.0, additions=1)
    assert state.left_out == ["a"]
    assert [(one["action"], one["block"]) for past in state.rounds for one in past["actions"]] == [
        ("remove", "c"), ("remove", "a"), ("add", "c"),
    ]  # fmt: skip


def test_a_target_that_no_network_meets_is_told_with_what_could_be_asked_for() -> None:
    table = begun(BLOCKS, 20.0).table
    check_target(table, 9.0, list(BLOCKS))
    with pytest.raises(UnreachableTarget, match=r"target is 8\.00 ms, a speed-up of 2\.50.*at most 2\.22 can be asked"):
        check_target(table, 8.0, list(BLOCKS))


def test_blocks_that_save_nothing_are_not_taken_for_ever() -> None:
    state = begun({"a": 0.0, "b": 0.0}, 20.0)
    with pytest.raises(UnreachableTarget, match="none of the blocks left saves any time"):
        evolve(state, {"a": 0.1, "b": 0.1}, target=10.0)


def test_a_state_on_disk_is_gone_on_from_by_its_own_search_only(tmp_path: Path) -> None:
    state = begun(BLOCKS, 20.0)
    evolve(state, WORTH, target=15.0)
    state.write(tmp_path / "search.json")
    assert SearchState.read(tmp_path / "search.json", {"seed": 0}) == state
    with pytest.raises(ValueError, match="made with seed = 0, this search has 1"):
        SearchState.read(tmp_path / "search.json", {"seed": 1})
    (tmp_path / "search.json").write_text('{"made_by": {}}')
    with pytest.raises(ValueError, match=r"search\.json: .* is missing"):
        SearchState.read(tmp_path / "search.json", {"seed": 0})


numbers = st.floats(0.1, 10)


@settings(deadline=None)
@given(
    blocks=st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(numbers, st.floats(-1, 1)), min_size=1),
    share=st.floats(0.05, 0.95), saving=numbers, additions=st.integers(0, 3),
)  # fmt: skip
def test_any_search_ends_within_its_target(
    blocks: dict[str, tuple[float, float]], share: float, saving: float, additions: int
) -> None:
    table = {path: cost for path, (cost, _) in blocks.items()}
    total = sum(table.values())
    state = begun(table, 1.0 + total)
    target = 1.0 + total * share
    evolve(state, {path: worth for path, (_, worth) in blocks.items()}, target, saving=saving, additions=additions)
    assert state.table.of(state.repeats) <= target + 1e-6
    assert not set(state.left_out) & set(state.copied)
    assert len(set(state.left_out)) == len(state.left_out)
