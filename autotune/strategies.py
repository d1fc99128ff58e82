"""How the space of a key is searched: which candidates are timed, for how many rounds, and which is taken.

A search is a generator: it yields an :class:`Ask` and is sent the samples, one value a round and candidate. It times nothing
itself, so that the same code tunes a device (``search.py``) and is replayed on recorded timings (``replay.py``).

All figures of a search are ratios to the default, which is in every round: what a round has of drift cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..kernels.config import LaunchConfig
from .timing import median_interval

STEPS = ("block", "rows_per_program", "num_warps", "num_stages", "programs_per_row", "max_registers", "num_threads")
"""The fields of a configuration that have an order, so that there is a next and a previous value."""


class Ask(NamedTuple):
    """Candidates to be timed against each other, the default among them, and the number of rounds."""

    configs: tuple[LaunchConfig, ...]
    rounds: int


Answer = dict[LaunchConfig, list[float]]
"""One time a round for each candidate that was asked for; one that cannot be timed is not there."""


class Found(NamedTuple):
    """What a search found.

    Attributes:
        ranked: the candidates that may be taken, the preferred first: where its proof fails, the next one is.
        ratios: for every candidate that was timed, the median of its time over the default's.
    """

    ranked: list[LaunchConfig]
    ratios: dict[LaunchConfig, float]


Search = Generator[Ask, Answer, Found]


@dataclass(frozen=True)
class Plan:
    """How much a search asks for.

    Attributes:
        first_rounds: rounds of the seeds and of the neighbours of the best.
        refinements: how often the neighbours of the best are looked at, at most.
        near: of the candidates whose ratio is within this factor of the best, ``contenders`` go on.
        contenders: how many go on at most.
        contender_rounds: rounds of the contenders.
        closest: of these, the ones that are within this factor of the best are timed for ``closest_rounds`` more.
        closest_rounds: rounds of the closest.
        tie: candidates within this factor of the best are as good as it; see :func:`preferred`.
    """

    first_rounds: int = 3
    refinements: int = 3
    near: float = 1.05
    contenders: int = 6
    contender_rounds: int = 5
    closest: float = 1.02
    closest_rounds: int = 8
    tie: float = 1.007


QUICK = Plan(refinements=2, contenders=4, contender_rounds=4, closest_rounds=6)
FULL = Plan()


# --- the space -------------------------------------------------------------------------------------------------------


def neighbours(config: LaunchConfig, space: Sequence[LaunchConfig]) -> list[LaunchConfig]:
    """The candidates one step away: the next or the previous value of one field, among the values of the same variant.

    A step in two fields counts where the work of a thread stays the same: twice the rows by twice the warps, half the block by
    twice the programs.
    """
    same = [other for other in space if other.variant == config.variant]
    values = {name: sorted({getattr(other, name) for other in (*same, config)}) for name in STEPS}
    places = {name: {value: place for place, value in enumerate(found)} for name, found in values.items()}

    def steps(other: LaunchConfig) -> list[int]:
        moved = (places[name][getattr(other, name)] - places[name][getattr(config, name)] for name in STEPS)
        return [abs(step) for step in moved if step]

    found = []
    for other in same:
        away = steps(other)
        if away == [1] or (away == [1, 1] and _share(other) == _share(config)):
            found.append(other)
    return found


def _share(config: LaunchConfig) -> float:
    """Scores a thread, up to a constant factor."""
    return config.rows_per_program * config.block / max(config.num_warps, 1)


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass
class Ratios:
    """Times over the default's, round by round."""

    default: LaunchConfig
    rounds: dict[LaunchConfig, list[float]] = field(default_factory=dict)
    failed: set[LaunchConfig] = field(default_factory=set)

    def take(self, ask: Ask, answer: Answer) -> None:
        pivot = answer.get(self.default)
        if pivot is None:
            raise DefaultFailed
        for config in ask.configs:
            samples = answer.get(config)
            if samples is None:
                self.failed.add(config)
                self.rounds.pop(config, None)
            else:
                ratios = [sample / base for sample, base in zip(samples, pivot, strict=True)]
                self.rounds.setdefault(config, []).extend(ratios)

    def medians(self) -> dict[LaunchConfig, float]:
        return {config: statistics.median(found) for config, found in self.rounds.items()}

    def known(self, config: LaunchConfig) -> bool:
        return config in self.rounds or config in self.failed


class DefaultFailed(Exception):
    """The default could not be timed, and everything is compared with it."""


def preferred(
    medians: dict[LaunchConfig, float], default: LaunchConfig, hints: Sequence[LaunchConfig], tie: float
) -> list[LaunchConfig]:
    """The order in which candidates are taken: first those within ``tie`` of the best by a fixed rule, then the others by time.

    The rule: the default; what neighbouring keys use, in their order; the least memory (checkpoint segments, then programs, which
    exchange sums in memory); the fewest registers and threads that are reserved.
    """
    best = min(medians.values())

    def rule(config: LaunchConfig) -> tuple[object, ...]:
        if medians[config] > best * tie:
            return (1, medians[config], _key(config))
        hint = hints.index(config) if config in hints else len(hints)
        return (0, config != default, hint, *_key(config))

    return sorted(medians, key=rule)


def _key(config: LaunchConfig) -> tuple[int, ...]:
    return (
        config.checkpoint_segments or 0,
        config.programs_per_row,
        config.max_registers,
        config.num_warps,
        config.rows_per_program,
        config.block,
        config.num_stages,
        config.num_threads,
        ("resident", "split", "tiled", "eager", "inductor").index(config.variant),
    )


def beats(samples: Sequence[float], default: Sequence[float]) -> bool:
    """Whether a candidate surely beats the default: the 95 % interval of the paired ratio lies below 1."""
    ratios = [a / b for a, b in zip(samples, default, strict=True)]
    return median_interval(ratios)[1] < 1.0


# --- the searches ----------------------------------------------------------------------------------------------------


def local_race(
    default: LaunchConfig,
    seeds: Iterable[LaunchConfig],
    space: Sequence[LaunchConfig],
    hints: Sequence[LaunchConfig] = (),
    plan: Plan = FULL,
) -> Search:
    """Our search: a few rounds of the seeds, then of the neighbours of the best as long as that helps, then more of those that
    are close.

    Args:
        default: what is shipped where nothing is better.
        seeds: where the search begins: few, and far from each other.
        space: all candidates.
        hints: what neighbouring keys use; those in the space are seeds too, and preferred where times are the same.
        plan: how much is asked for.
    """
    inside = set(space)
    hints = [hint for hint in hints if hint in inside]
    ratios = Ratios(default)

    def ask(configs: Iterable[LaunchConfig], rounds: int) -> Generator[Ask, Answer, None]:
        asked = Ask(tuple(dict.fromkeys([default, *configs])), rounds)
        ratios.take(asked, (yield asked))

    def by_time(medians: dict[LaunchConfig, float]) -> list[LaunchConfig]:
        return sorted(medians, key=lambda one: (medians[one], _key(one)))

    yield from ask([*hints, *(seed for seed in seeds if seed in inside)], plan.first_rounds)
    looked: set[LaunchConfig] = set()
    for _ in range(plan.refinements):
        medians = ratios.medians()
        # from the best two, for the best of few rounds may be so by luck
        centres = [config for config in by_time(medians)[:2] if config not in looked]
        looked.update(centres)
        around = [other for centre in centres for other in neighbours(centre, space) if not ratios.known(other)]
        if around:
            yield from ask(around, plan.first_rounds)
    for factor, most, rounds in (
        (plan.near, plan.contenders, plan.contender_rounds),
        (plan.closest, plan.contenders, plan.closest_rounds),
    ):
        medians = ratios.medians()
        best = min(medians.values())
        close = [
            config for config in sorted(medians, key=lambda one: (medians[one], _key(one))) if medians[config] <= factor * best
        ]
        if close and close != [default]:
            yield from ask(close[:most], rounds)
    medians = ratios.medians()
    return Found(preferred(medians, default, hints, plan.tie), medians)


def launches(asks: Iterable[Ask]) -> int:
    """How many timed launches some asks take: one a candidate and round."""
    return sum(len(ask.configs) * ask.rounds for ask in asks)


def sampled(default: LaunchConfig, order: Sequence[LaunchConfig], rounds: int, batch: int = 16) -> Search:
    """Candidates in the order given, each for the same number of rounds, with the default: exhaustive, or random up to a limit."""
    ratios = Ratios(default)
    for begin in range(0, max(len(order), 1), batch):
        asked = Ask(tuple(dict.fromkeys([default, *order[begin : begin + batch]])), rounds)
        ratios.take(asked, (yield asked))
    medians = ratios.medians()
    return Found(sorted(medians, key=lambda one: (medians[one], _key(one))), medians)


def noise(samples: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the median, as a share of it; NaN of nothing."""
    if not samples:
        return math.nan
    low, high = median_interval(samples)
    return (high - low) / 2 / statistics.median(samples)
