"""The search for an efficient UNet: evolution by actions "remove or add block (stage, index)" under a latency target.

SnapFusion (arXiv 2306.00980), section 3.1: a block's value is the score lost without it per millisecond that it takes.
Blocks of least value go until the target is met; what is then left of it may be spent on blocks of most value, on one
that was left out or on a second copy. Between rounds the network, still trained robustly, gets used to what it has
lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from catimage_accel.snapfusion.latency import LatencyTable
from catimage_accel.storage import Strict, read_json, validated, write_atomic

Score = Callable[[Sequence[str]], float]
"""The mean quality of the network with these blocks alone."""


class UnreachableTarget(ValueError):
    """No network that the actions lead to is as fast as asked for."""


class _StateFields(Strict):
    made_by: dict[str, Any]
    left_out: list[str]
    copied: list[str]
    rounds: list[dict[str, Any]]
    done: bool
    table: dict[str, Any]
    whole_score: Annotated[float, Field(ge=-1e9)]


@dataclass
class SearchState:
    """How far a search has come; written after every round, so that a killed search goes on.

    ``made_by`` is what it depends on: a state of another search is not gone on from.
    """

    made_by: dict[str, Any]
    table: LatencyTable
    whole_score: float
    left_out: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    @property
    def repeats(self) -> dict[str, int]:
        """The architecture found so far: path -> copies, 1 where absent."""
        return dict.fromkeys(self.left_out, 0) | dict.fromkeys(self.copied, 2)

    def write(self, path: Path) -> None:
        write_atomic(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path, made_by: Mapping[str, Any]) -> SearchState:
        """The state in ``path``; ValueError if it can't be read or was made by another search."""
        fields = validated(_StateFields, read_json(path), str(path))
        for name in sorted({*fields.made_by, *made_by}):
            if (before := fields.made_by.get(name)) != (now := made_by.get(name)):
                raise ValueError(
                    f"{path} was made with {name} = {before!r}, this search has {now!r}; go on with the settings it "
                    "was begun with, or give the search a folder of its own"
                )
        values = fields.model_dump()
        return cls(**{**values, "table": LatencyTable(**values["table"])})


def check_target(table: LatencyTable, target: float, removable: Sequence[str]) -> None:
    """UnreachableTarget if the UNet without any of the ``removable`` blocks takes more than ``target`` milliseconds."""
    least = table.of(dict.fromkeys(removable, 0))
    if least > target:
        raise UnreachableTarget(
            f"the target is {target:.2f} ms, a speed-up of {table.whole / target:.2f}; without all {len(removable)} "
            f"blocks that can be left out the UNet still takes {least:.2f} ms, so at most {table.whole / least:.2f} "
            f"can be asked for (on {table.engine}, {table.rows} rows, {table.device})"
        )


def block_values(
    score: Score, active: Sequence[str], table: LatencyTable, advance: Callable[[int], None] = lambda _: None
) -> tuple[float, dict[str, float], dict[str, float]]:
    """(the network's score, what is lost without each active block, that per millisecond saved)."""
    whole = score(active)
    lost = {}
    for path in active:
        lost[path] = whole - score([other for other in active if other != path])
        advance(1)
    # What takes no measurable time is not worth removing.
    return whole, lost, {path: lost[path] / max(table.blocks[path], 1e-3 * table.whole) for path in active}


def evolve_once(
    state: SearchState,
    score: Score,
    active: Sequence[str],
    repeatable: Sequence[str],
    measure: Callable[[Mapping[str, int]], float],
    target: float,
    saving: float,
    additions: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """One round: values every active block, then removes or adds. Sets ``state.done`` when nothing is left to do.

    ``measure`` gives the milliseconds of an architecture: blocks left out together save something else than the sum of
    what each saves alone. Removes blocks of least value until ``saving`` milliseconds are saved or
    ``target`` should be met. If it is met already, blocks of most value, those left out at what they were worth then,
    are added: what was left out comes back, what is there gets a second copy, as long as the target holds and at most
    ``additions`` of them.
    """
    whole, lost, value = block_values(score, active, state.table, advance)
    milliseconds = measure(state.repeats)
    cost, chosen, after = state.table.blocks, [], milliseconds
    if milliseconds > target:
        for path in sorted(active, key=lambda one: value[one]):
            if after <= target or milliseconds - after >= saving:
                break
            if cost[path] > 0:
                state.left_out.append(path)
                after -= cost[path]
                chosen.append({"action": "remove", "block": path, "value": value[path], "lost": lost[path]})
        if not chosen:
            raise UnreachableTarget(
                f"the target is {target:.2f} ms, but none of the blocks left saves any time: {milliseconds:.2f} ms"
            )
    else:
        worth = {one["block"]: one["value"] for past in state.rounds for one in past["actions"]}
        worth = {path: worth[path] for path in state.left_out}
        worth |= {path: value[path] for path in active if path in repeatable}
        for path in sorted(worth, key=lambda one: -worth[one]):
            if len(chosen) == additions or worth[path] <= 0 or after + cost[path] > target:
                continue
            copies = 1 if path in state.left_out else 2
            if (grown := measure(state.repeats | {path: copies})) > target:
                continue
            after = grown
            if copies == 1:
                state.left_out.remove(path)
            else:
                state.copied.append(path)
            chosen.append({"action": "add", "block": path, "value": worth[path], "lost": lost.get(path)})
        state.done = True
    values = {path: round(one, 6) for path, one in value.items()}
    state.rounds.append({"score": whole, "milliseconds": milliseconds, "actions": chosen, "values": values})
