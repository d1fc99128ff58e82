"""How the space of a key is searched: which candidates are timed, for how many rounds, and which is taken.

A search is a generator: it yields an :class:`Ask` and is sent the samples, one value a round and candidate. It times nothing
itself, so that the same code tunes a device (``search.py``) and is replayed on recorded timings (``replay.py``).

All figures of a search are ratios to the default, which is in every round: what a round has of drift cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..kernels.config import LaunchConfig
from .timing import median_interval

STEPS = ("block", "rows_per_program", "num_warps", "num_stages", "programs_per_row", "num_threads")
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
        every_shape: begin with all candidates that do not limit registers, not only with the seeds.
        first_rounds: rounds of the seeds and of the neighbours of the best.
        centres: how many of the best have their neighbours looked at.
        refinements: how often that is done, at most.
        near: of the candidates whose ratio is within this factor of the best, ``contenders`` go on.
        contenders: how many go on at most.
        contender_rounds: rounds of the contenders.
        tie: candidates within this factor of the best are as good as it; see :func:`preferred`.
        keep: and the default within this one: what gains less here may lose as much at the sizes around.
        doubts: how often those of which it is not clear whether they are within ``tie`` or ``keep`` are timed again, at most.
        doubt_rounds: rounds of these.
    """

    every_shape: bool = True
    first_rounds: int = 3
    centres: int = 3
    refinements: int = 4
    near: float = 1.03
    contenders: int = 8
    contender_rounds: int = 6
    tie: float = 1.0035
    keep: float = 1.01
    doubts: int = 6
    doubt_rounds: int = 8


QUICK = Plan(every_shape=False, centres=1, refinements=1, contenders=4, contender_rounds=5, doubts=1)
FULL = Plan()
HINTED = replace(QUICK, refinements=0)
NEARBY = replace(FULL, every_shape=False)


def after(plan: Plan) -> Plan:
    """The plan of a key whose shape was searched by ``plan`` in another dtype.

    After a quick search what was found there is timed against the default, and no more is compiled; after a full one the search
    begins at that and beside the default instead of with all shapes.
    """
    return HINTED if plan == QUICK else NEARBY if plan == FULL else plan


# --- the space -------------------------------------------------------------------------------------------------------


def neighbours(config: LaunchConfig, space: Sequence[LaunchConfig]) -> list[LaunchConfig]:
    """The candidates one step away.

    A step is the next or the previous value of one field, of those that occur beside the same values of the other fields. A
    step in two fields counts where the work of a thread stays the same: twice the rows by twice the warps, half the block by
    twice the programs. After a step the limit of registers may be the same, none, or of those that occur the nearest to it or to
    what gives a program as many registers as before; and the next limits, and none, are steps themselves.
    """
    same = [other for other in space if other.variant == config.variant]
    shapes = {_shape(other): [one for one in same if _shape(one) == _shape(other)] for other in same}
    here = _shape(config)
    found = _next_limits(config, shapes.get(here, []))
    for shape in _next_shapes(here, list(shapes)):
        limits = {other.max_registers: other for other in shapes[shape]}
        taken = [config.max_registers, 0]
        warps = max(1, shape[STEPS.index("num_warps")])  # 0 on a CPU
        for wanted in (config.max_registers, config.max_registers * config.num_warps / warps):
            taken.append(min(limits, key=lambda limit: (limit == 0, abs(limit - wanted))))
        found += [limits[limit] for limit in dict.fromkeys(taken) if limit in limits]
    return list(dict.fromkeys(found))


_Shape = tuple[int, ...]


def _shape(config: LaunchConfig) -> _Shape:
    return tuple(getattr(config, name) for name in STEPS)


def _next_limits(config: LaunchConfig, same: list[LaunchConfig]) -> list[LaunchConfig]:
    """No limit of registers is the widest of them, and a step from any."""
    ordered = sorted(same, key=lambda other: other.max_registers or 1 << 20)
    limits = [other.max_registers for other in ordered]
    if config.max_registers not in limits:
        return ordered
    place = limits.index(config.max_registers)
    near = ordered[max(place - 1, 0) : place] + ordered[place + 1 : place + 2]
    return near + [other for other in ordered if other.max_registers == 0 and other != config]


def _next_shapes(here: _Shape, shapes: list[_Shape]) -> list[_Shape]:
    found: list[_Shape] = []
    for i in range(len(STEPS)):
        line = sorted({shape[i] for shape in shapes if shape[:i] + shape[i + 1 :] == here[:i] + here[i + 1 :]} | {here[i]})
        place = line.index(here[i])
        for value in line[max(place - 1, 0) : place] + line[place + 1 : place + 2]:
            found.append((*here[:i], value, *here[i + 1 :]))
    block, rows, warps, programs = (STEPS.index(name) for name in ("block", "rows_per_program", "num_warps", "programs_per_row"))
    for one, two, sign in ((rows, warps, 1), (block, warps, 1), (block, programs, -1)):
        for up in (1, -1):
            moved = list(here)
            for place, step in ((one, up), (two, sign * up)):
                moved[place] = moved[place] * 2 if step > 0 else moved[place] // 2
            if tuple(moved) in shapes:
                found.append(tuple(moved))
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def low(samples: Sequence[float]) -> float:
    """A lower quartile. Of few samples it is the least: what disturbs a sample makes it longer, by 10 % and more now and then."""
    return sorted(samples)[(len(samples) - 1) // 4]


ENOUGH = 9
"""From how many samples on the median of paired ratios is the better figure: what disturbs a few of them does not move it."""


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """The time of one over that of another, by samples of the same rounds."""
    if len(samples) < ENOUGH:
        return low(samples) / low(base)
    return statistics.median(one / other for one, other in zip(samples, base, strict=True))


@dataclass
class Ratios:
    """Times over the default's in the same rounds."""

    default: LaunchConfig
    times: dict[LaunchConfig, list[float]] = field(default_factory=dict)
    bases: dict[LaunchConfig, list[float]] = field(default_factory=dict)
    failed: set[LaunchConfig] = field(default_factory=set)

    def take(self, ask: Ask, answer: Answer) -> None:
        pivot = answer.get(self.default)
        if pivot is None:
            raise DefaultFailed
        for config in ask.configs:
            samples = answer.get(config)
            if samples is None:
                self.failed.add(config)
                self.times.pop(config, None)
                self.bases.pop(config, None)
            else:
                self.times.setdefault(config, []).extend(samples)
                self.bases.setdefault(config, []).extend(pivot)

    def figures(self) -> dict[LaunchConfig, float]:
        """Of every candidate the time over the default's in the same rounds (:func:`ratio`)."""
        return {config: ratio(times, self.bases[config]) for config, times in self.times.items()}

    def interval(self, config: LaunchConfig) -> tuple[float, float]:
        """Of the median of the paired ratios, 95 %."""
        return median_interval([time / base for time, base in zip(self.times[config], self.bases[config], strict=True)])

    def doubtful(self, configs: Sequence[LaunchConfig], hints: Sequence[LaunchConfig], plan: Plan) -> list[LaunchConfig]:
        """What has to be timed again to know which candidate is taken; nothing where that is clear.

        That is the best, and every candidate that the rule prefers to the one that would be taken now, and of which it is not
        clear whether it is within ``plan.tie`` of the best (the default: ``plan.keep``), and this one if it is not clear of it
        either.
        """
        known = self.figures()
        figures = {config: known[config] for config in configs if config in known}
        if not figures:
            return []
        best = min(figures, key=lambda one: (figures[one], _key(one)))
        taken = preferred(figures, self.default, hints, plan)[0]
        found = [best]
        for config in figures:
            if config == best:
                continue
            least, most = self.interval(best if config == self.default else config)
            # the default's own ratio is 1 without a doubt: that of the best says how far it is away
            limit = 1 / plan.keep if config == self.default else plan.tie * figures[best]
            if least <= limit <= most:
                # would it be taken, if it were within that?
                pair = {config: 1.0, taken: 1.0}
                if config == taken or preferred(pair, self.default, hints, plan)[0] == config:
                    found.append(config)
        return found if len(found) > 1 else []

    def known(self, config: LaunchConfig) -> bool:
        return config in self.times or config in self.failed


class DefaultFailed(Exception):
    """The default could not be timed, and everything is compared with it."""


def preferred(
    figures: dict[LaunchConfig, float], default: LaunchConfig, hints: Sequence[LaunchConfig], plan: Plan
) -> list[LaunchConfig]:
    """The order in which candidates are taken: first those within ``plan.tie`` of the best, and the default within ``plan.keep``,
    by a fixed rule, then the others by time.

    The rule: the default; what neighbouring keys use, in their order; the least memory (checkpoint segments, then programs, which
    exchange sums in memory); the fewest registers and threads that are reserved.
    """
    best = min(figures.values())

    def rule(config: LaunchConfig) -> tuple[object, ...]:
        if figures[config] > best * (plan.keep if config == default else plan.tie):
            return (1, figures[config], _key(config))
        hint = hints.index(config) if config in hints else len(hints)
        return (0, config != default, hint, *_key(config))

    return sorted(figures, key=rule)


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

    def by_time(figures: dict[LaunchConfig, float]) -> list[LaunchConfig]:
        return sorted(figures, key=lambda one: (figures[one], _key(one)))

    first = [*hints, *(seed for seed in seeds if seed in inside)]
    if plan.every_shape:
        first += [config for config in space if config.max_registers == 0]
    yield from ask(first, plan.first_rounds)
    looked: set[LaunchConfig] = set()
    for _ in range(plan.refinements):
        figures = ratios.figures()
        # from the best few, for the best of few rounds may be so by luck
        centres = [config for config in by_time(figures)[: plan.centres] if config not in looked]
        looked.update(centres)
        around = dict.fromkeys(other for centre in centres for other in neighbours(centre, space) if not ratios.known(other))
        if around:
            yield from ask(around, plan.first_rounds)
    timed: set[LaunchConfig] = set()
    while True:
        figures = ratios.figures()
        best = min(figures.values())
        close = [config for config in by_time(figures) if figures[config] <= plan.near * best][: plan.contenders]
        fresh = [config for config in close if config not in timed]
        if close == [default] or not fresh:
            break
        # the best falls back in more rounds if it was so by luck, and then those that it had left behind are close
        yield from ask([close[0], *fresh], plan.contender_rounds)
        timed.update(close)
    if timed:
        for _ in range(plan.doubts):
            doubtful = ratios.doubtful(close, hints, plan)
            if not doubtful:
                break
            yield from ask(doubtful, plan.doubt_rounds)
    figures = ratios.figures()
    return Found(preferred(figures, default, hints, plan), figures)


def sampled(default: LaunchConfig, order: Sequence[LaunchConfig], rounds: int, batch: int = 16) -> Search:
    """Candidates in the order given, each for the same number of rounds, with the default: exhaustive, or random up to a limit."""
    ratios = Ratios(default)
    for begin in range(0, max(len(order), 1), batch):
        asked = Ask(tuple(dict.fromkeys([default, *order[begin : begin + batch]])), rounds)
        ratios.take(asked, (yield asked))
    figures = ratios.figures()
    return Found(sorted(figures, key=lambda one: (figures[one], _key(one))), figures)
