"""What follows from the timings of all candidates of a key, and from searches that were replayed on them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .evidence import TIMED, Json, form, usable


def quantile(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed; none is made up between two."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


# --- the landscape ---------------------------------------------------------------------------------------------------

NEAR = 1.05
"""Within 5 % of the best."""


@dataclass(frozen=True)
class Landscape:
    """All candidates of one key.

    Attributes:
        key: op, direction, dtype, rows, n.
        configs: of every candidate.
        times: the median of its samples in microseconds, or of the candidate with the same binary; None for one that was dropped.
        dropped: status -> how many.
        default: the default's index; best: that of the least time, the default where it is one of them; None where nothing has one.
        serves: the index of what a call of these sizes got; None where the file does not say.
    """

    key: Json
    configs: list[Json]
    times: list[float | None]
    dropped: Counter[str]
    default: int
    best: int | None
    serves: int | None = None

    @property
    def timed(self) -> list[int]:
        return [i for i, time in enumerate(self.times) if time is not None]

    @property
    def best_us(self) -> float | None:
        return None if self.best is None else self.times[self.best]

    @property
    def over_best(self) -> float | None:
        """The default's time over the best's."""
        return self._over(self.default)

    @property
    def serving_over_best(self) -> float | None:
        """The time of what served, over the best's."""
        return None if self.serves is None else self._over(self.serves)

    def _over(self, index: int) -> float | None:
        time, best = self.times[index], self.best_us
        return None if time is None or best is None else time / best

    @property
    def near(self) -> list[int]:
        """Those within 5 % of the best, itself among them."""
        best = self.best_us
        return [] if best is None else [i for i in self.timed if self.times[i] <= NEAR * best]  # type: ignore[operator]


def landscapes(exhaustive: Json) -> list[Landscape]:
    """One of each key, in the order of the file."""
    return [_landscape(key) for key in exhaustive["keys"]]


def _landscape(key: Json) -> Landscape:
    candidates, default = key["candidates"], key["default"]
    times: list[float | None] = []
    for one in candidates:
        samples = one["samples"] if one["same_as"] is None else candidates[one["same_as"]]["samples"]
        median = statistics.median(samples) if one["status"] == TIMED and samples is not None else None
        times.append(median if usable(median) else None)
    dropped = Counter(one["status"] for one in candidates if one["status"] != TIMED)
    timed = [(time, i != default, i) for i, time in enumerate(times) if time is not None]
    best = min(timed)[2] if timed else None
    return Landscape(key["key"], [one["config"] for one in candidates], times, dropped, default, best, key.get("serves"))


def spread(found: list[Landscape], most: int) -> list[Landscape]:
    """A few of them that differ in operator and direction first and then in length as much as they can; always the same ones."""
    left = [(i, one) for i, one in enumerate(found) if len(one.timed) > 1]
    taken: list[tuple[int, Landscape]] = []

    def cost(item: tuple[int, Landscape]) -> tuple[float, ...]:
        i, one = item
        alike = sum((x.key["op"], x.key["direction"]) == (one.key["op"], one.key["direction"]) for _, x in taken)
        long = sum(x.key["n"] == one.key["n"] for _, x in taken)
        near = min((abs(math.log2(max(x.key["n"], 1) / max(one.key["n"], 1))) for _, x in taken), default=0.0)
        return alike, long, -near, i

    while left and len(taken) < most:
        best = min(left, key=cost)
        left.remove(best)
        taken.append(best)
    ops = list(dict.fromkeys(one.key["op"] for one in found))
    directions = list(dict.fromkeys(one.key["direction"] for one in found))
    taken.sort(
        key=lambda item: (ops.index(item[1].key["op"]), directions.index(item[1].key["direction"]), item[1].key["n"], item[0])
    )
    return [one for _, one in taken]


# --- fewer configurations --------------------------------------------------------------------------------------------

FEWER = (8, 16, 24, 32)


class Fewer(NamedTuple):
    """What it would cost an operator to be left with so many forms of configurations: shares by which its keys would be slower."""

    forms: int
    median: float
    p95: float
    worst: float


def fewer(keys: list[Json], counts: tuple[int, ...] = FEWER) -> list[Fewer]:
    """The cost of being left with few forms, chosen one after the other by what each saves; of the keys of one operator.

    By the medians of the search, of candidates with as many checkpoint segments as the default. A key that a form was not timed for
    cannot be served by it. A count at which some key is not served at all is left out.
    """
    slower = []
    for key in keys:
        times: dict[object, float] = {}
        told = [one for one in key["candidates"] if "config" in one]
        for one in told:
            same = one["config"]["checkpoint_segments"] == told[0]["config"]["checkpoint_segments"]
            if same and one["status"] == TIMED and usable(one.get("median_us")):
                name = form(one["config"])
                times[name] = min(times.get(name, math.inf), one["median_us"])
        if times:
            slower.append({name: time / min(times.values()) - 1 for name, time in times.items()})
    every = sorted({name for one in slower for name in one}, key=str)
    cost, chosen, found = [_UNSERVED] * len(slower), set[object](), []
    while len(chosen) < min(len(every), max(counts)):
        best = min((name for name in every if name not in chosen), key=lambda name: sum(_left(cost, slower, name)))
        chosen.add(best)
        cost = _left(cost, slower, best)
        if len(chosen) in counts and cost and max(cost) < _UNSERVED:
            found.append(Fewer(len(chosen), statistics.median(cost), quantile(cost, 0.95), max(cost)))
    return found


_UNSERVED = 3.0
"""What a key counts that no form serves, when the next one is chosen: more than any that is served."""


def _left(cost: list[float], slower: list[dict[object, float]], name: object) -> list[float]:
    return [min(now, one.get(name, _UNSERVED)) for now, one in zip(cost, slower, strict=True)]


TRANSFER_GOAL = 1.05
"""What serves between the keys takes at most so many times what the best there would: at the 95th percentile."""

UPGRADE_GOAL = 0.10
"""Of the time of a search, proving and timing anew what it had chosen takes at most this share."""

QUICK_GOAL = 120.0
"""Seconds that a search of effort quick takes on one GPU, at most."""

# --- the search, replayed --------------------------------------------------------------------------------------------

REGRET_GOALS = {"median": 0.01, "p95": 0.03, "worst": 0.05}
FEW_CANDIDATES = 40
"""Of a key with fewer, a search may time a larger share."""

SHARE_GOAL, SHARE_GOAL_OF_FEW, STABLE_GOAL = 0.10, 0.25, 0.95


class Goal(NamedTuple):
    """A goal of the search: what is limited, its figure, the limit, whether more is better, and what there is to add."""

    name: str
    figure: float
    limit: float
    at_least: bool = False
    more: str = ""

    @property
    def met(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


def goals(strategy: Json) -> list[Goal]:
    """The goals of a strategy, from what its replays came to; none where no key was replayed. Of launches each replay counts."""
    if not strategy["keys"]:
        return []
    found = [Goal(f"{name} regret", strategy["regret"][name], limit) for name, limit in REGRET_GOALS.items()]
    for few, limit in ((False, SHARE_GOAL), (True, SHARE_GOAL_OF_FEW)):
        keys = [key for key in strategy["keys"] if (key["candidates"] < FEW_CANDIDATES) == few]
        if keys:
            over = sum(max(key["share"]) > limit for key in keys)
            which = f"{'fewer than' if few else 'at least'} {FEW_CANDIDATES} candidates"
            worst = max(max(key["share"]) for key in keys)
            more = (
                f"{over} of {len(keys)} such keys above it" if over else f"{len(keys)} such keys" if len(keys) > 1 else "1 such key"
            )
            found.append(Goal(f"share of the launches, of a key with {which}", worst, limit, more=more))
    return [*found, Goal("share of keys with the same choice whatever the seed", strategy["stable"], STABLE_GOAL, at_least=True)]
