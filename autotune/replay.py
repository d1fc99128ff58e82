"""Searches replayed on the recorded timings of every candidate of some keys. Nothing is compiled or timed, so no GPU is needed.

The rounds of the recording are cut in two. The truth about a candidate is the median of its even rounds; what a search is told
comes from the odd rounds alone, so that luck in what it saw does not count as speed. The best of the truth is still the least of
many medians, which chance flatters; the regret is told as it comes and not corrected for that.

For each key and seed the odd rounds have a random order. A search that asks for some rounds gets the next ones, the same for all
candidates that it asked for, as they were recorded side by side. When the rounds run out they come again in another order.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.config import Key, LaunchConfig
from ..reports import evidence
from ..reports.candidates import quantile
from . import peers, space, strategies
from .strategies import FULL, QUICK, Answer, Found, Plan, Ratios, Search

Json = dict[str, Any]

Progress = Callable[[int, int, str, "float | None"], None]
"""Called with (total, done, text, seconds left or None)."""

FINAL_ROUNDS = 25
"""Fresh samples of the default and of what our search found, after which it is decided between the two."""

SAMPLES = 3
"""Rounds of a candidate in the searches that give each candidate the same."""

OURS: dict[str, Plan] = {"coordroute": FULL, "coordroute-quick": QUICK}
EXHAUSTIVE, RANDOM = "exhaustive", "random"

PEERS = (
    "genetic_algorithm",
    "greedy_mls",
    "simulated_annealing",
    "dual_annealing",
    "pso",
    "DifferentialEvolutionSearch",
    "PatternSearch",
)
"""The strategies of other packages that are replayed where none are named; those of a package that is not installed are left out.
Not among them are what the seed does not determine, what takes a tenth of a second a search or more, and what fails where a
candidate has no neighbour."""

CURVE = tuple(0.005 * 200 ** (i / 11) for i in range(12))
"""Shares of the launches at which it is said what a search would take: from 0.5 % to all of them."""


# --- the recording ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """All candidates of a key, with what was recorded of them.

    Attributes:
        key: op, direction, dtype, rows, n.
        candidates: all of them, in the order of the file.
        default: what is shipped where nothing is better.
        seeds: where our search begins.
        same: every candidate that was timed -> the one with the same binary whose samples count for it, or itself.
        samples: of the latter, microseconds in each round.
        truth: of the latter, the median of the even rounds.
        best: the least of these; NaN where nothing was timed.
    """

    key: Key
    candidates: tuple[LaunchConfig, ...]
    default: LaunchConfig
    seeds: tuple[LaunchConfig, ...]
    same: dict[LaunchConfig, LaunchConfig]
    samples: dict[LaunchConfig, list[float]]
    truth: dict[LaunchConfig, float]
    best: float

    def regret(self, config: LaunchConfig) -> float:
        """By how much a candidate is slower than the best, 0 for the best itself."""
        return self.truth[self.same[config]] / self.best - 1


@dataclass(frozen=True)
class Recording:
    """A file with the timings of every candidate.

    Attributes:
        name: of the file.
        device, versions: as in the file.
        rounds: how many there are.
        keys: those that can be replayed, in the order of the file.
        left_out: those that cannot, as their default was not timed, with which everything is compared.
    """

    name: str
    device: Json
    versions: Json
    rounds: int
    keys: list[Recorded]
    left_out: list[Key]


def read(path: Path) -> Recording:
    """Reads and checks what ``coordroute exhaust`` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: the file cannot be read, is not such a file, or has no key that can be replayed.
    """
    data = evidence.read_file(path, "exhaustive")
    rounds = data["rounds"]
    if rounds < 2:
        raise ValueError(f"{path}: rounds is {rounds}; at least 2 are needed, one to search by and one to judge by")
    keys = [_recorded(path, f"keys[{i}]", key, rounds) for i, key in enumerate(data["keys"])]
    fit = [one for one in keys if one.default in one.same]
    if not fit:
        raise ValueError(f"{path}: of none of {len(keys)} keys the default was timed; at least one is needed")
    left_out = [one.key for one in keys if one.default not in one.same]
    return Recording(path.name, data["device"], data["versions"], rounds, fit, left_out)


def _recorded(path: Path, at: str, data: Json, rounds: int) -> Recorded:
    key = Key(*(data["key"][name] for name in Key._fields))
    if key.rows < 1 or key.n < 1:
        raise ValueError(f"{path}: {at}.key is of {key.rows} rows of {key.n}; at least one of each is needed")
    configs: list[LaunchConfig] = []
    for j, one in enumerate(data["candidates"]):
        try:
            config = LaunchConfig.from_json(one["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {at}.candidates[{j}].config is no configuration: {error}") from error
        if config in configs:
            raise ValueError(f"{path}: {at}.candidates[{j}] has the configuration of candidates[{configs.index(config)}]")
        if one["samples"] is not None:
            _check_samples(path, f"{at}.candidates[{j}].samples", one["samples"], rounds)
        configs.append(config)
    same, samples = {}, {}
    for config, one in zip(configs, data["candidates"], strict=True):
        index = configs.index(config) if one["same_as"] is None else one["same_as"]
        found = data["candidates"][index]["samples"]
        if one["status"] == evidence.TIMED and found is not None:
            same[config] = configs[index]
            samples[configs[index]] = found
    truth = {config: statistics.median(found[::2]) for config, found in samples.items()}
    seeds = tuple(configs[index] for index in data["seeds"])
    best = min(truth.values(), default=math.nan)
    return Recorded(key, tuple(configs), configs[data["default"]], seeds, same, samples, truth, best)


def _check_samples(path: Path, at: str, samples: list[float], rounds: int) -> None:
    if len(samples) != rounds:
        raise ValueError(f"{path}: {at} are {len(samples)}; one for each of {rounds} rounds is needed")
    bad = next((sample for sample in samples if not evidence.usable(sample)), None)
    if bad is not None:
        raise ValueError(f"{path}: {at} has {bad!r}; microseconds above 0 are needed")


class Draw:
    """Hands out samples to one search and counts its launches.

    Attributes:
        launches: one for each round and binary so far.
        rounds: rounds handed out so far.
    """

    def __init__(self, recorded: Recorded, rounds: int, seed: int) -> None:
        self.launches = self.rounds = 0
        self._recorded = recorded
        self._random = random.Random(f"{' '.join(map(str, recorded.key))} {seed}")
        self._odd = range(1, rounds, 2)
        self._left: list[int] = []

    def take(self, configs: Iterable[LaunchConfig], rounds: int) -> Answer:
        """The next rounds of some candidates. What was not timed is not in the answer, and costs nothing."""
        turns = [self._turn() for _ in range(rounds)]
        same = self._recorded.same
        timed = [config for config in configs if config in same]
        self.launches += rounds * len({same[config] for config in timed})
        self.rounds += rounds
        return {config: [self._recorded.samples[same[config]][turn] for turn in turns] for config in timed}

    def _turn(self) -> int:
        if not self._left:
            self._left = self._random.sample(self._odd, len(self._odd))
        return self._left.pop()


# --- the searches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """What one search did.

    Attributes:
        chosen: what it took.
        launches: how many it needed.
        rounds: how many rounds it asked for.
        path: after each answer the launches so far, and what it would have taken if it had been stopped there.
    """

    chosen: LaunchConfig
    launches: int
    rounds: int
    path: list[tuple[int, LaunchConfig]]


def ours(
    recorded: Recorded, rounds: int, seed: int, hints: Sequence[LaunchConfig] = (), plan: Plan = FULL, follows: bool = False
) -> Replayed:
    """Our search, and the final between the default and what was found.

    Args:
        recorded: the key. Its default must have been timed.
        rounds: of the recording.
        seed: of the order of the rounds.
        hints: what neighbouring keys use.
        plan: how much is asked for.
        follows: whether the shape was searched in another dtype before.
    """
    draw = Draw(recorded, rounds, seed)
    path: list[tuple[int, LaunchConfig]] = []
    plan = strategies.after(plan) if follows else plan
    seeds = () if plan == strategies.HINTED else recorded.seeds
    race = strategies.local_race(recorded.default, seeds, recorded.candidates, hints, plan)
    chosen = _followed(race, recorded, draw, path).ranked[0]
    if recorded.same[chosen] == recorded.same[recorded.default]:
        chosen = recorded.default
    else:
        final = draw.take((recorded.default, chosen), FINAL_ROUNDS)
        if not strategies.beats(final[chosen], final[recorded.default]):
            chosen = recorded.default
    path.append((draw.launches, chosen))
    return Replayed(chosen, draw.launches, draw.rounds, path)


def exhaustive(recorded: Recorded, rounds: int, seed: int) -> Replayed:
    """Every candidate for all odd rounds; the least median is taken."""
    return _sampled(recorded, Draw(recorded, rounds, seed), list(recorded.samples), rounds // 2)


def at_random(recorded: Recorded, rounds: int, seed: int, launches: int) -> Replayed:
    """Candidates in random order, each for a few rounds, as many as the launches suffice for; the least median is taken."""
    order = [config for config in recorded.samples if config != recorded.same[recorded.default]]
    random.Random(f"order {' '.join(map(str, recorded.key))} {seed}").shuffle(order)
    batch = 16
    # the default is in every batch
    while order and SAMPLES * (len(order) + math.ceil(len(order) / batch)) > launches:
        order.pop()
    return _sampled(recorded, Draw(recorded, rounds, seed), order, SAMPLES, batch)


def of_peer(name: str, recorded: Recorded, rounds: int, seed: int, launches: int) -> Replayed:
    """A strategy of another package, which times one candidate after the other.

    It is given what can be timed, one candidate for each binary: what does not work costs it nothing.

    Args:
        name: as in ``peers.search``.
        recorded: the key. Its default must have been timed.
        rounds: of the recording.
        seed: of the search and of the order of the rounds.
        launches: the most that it may use; one evaluation in any case.
    """
    draw = Draw(recorded, rounds, seed)
    path: list[tuple[int, LaunchConfig]] = []
    costs: dict[LaunchConfig, float] = {}

    def cost(config: LaunchConfig) -> float:
        costs[config] = statistics.median(draw.take((config,), SAMPLES)[config])
        path.append((draw.launches, min(costs, key=costs.__getitem__)))
        return costs[config]

    default = recorded.same[recorded.default]
    candidates = [default, *(config for config in recorded.samples if config != default)]
    chosen = peers.search(name, candidates, cost, max(launches // SAMPLES, 1), seed)
    return Replayed(chosen, draw.launches, draw.rounds, [*path, (draw.launches, chosen)])


def _sampled(recorded: Recorded, draw: Draw, order: list[LaunchConfig], rounds: int, batch: int = 16) -> Replayed:
    path: list[tuple[int, LaunchConfig]] = []
    chosen = _followed(strategies.sampled(recorded.default, order, rounds, batch), recorded, draw, path).ranked[0]
    return Replayed(chosen, draw.launches, draw.rounds, [*path, (draw.launches, chosen)])


def _followed(search: Search, recorded: Recorded, draw: Draw, path: list[tuple[int, LaunchConfig]]) -> Found:
    """Runs a search to its end; after each answer the best so far goes to ``path``."""
    seen = Ratios(recorded.default)
    asked = next(search)
    while True:
        answer = draw.take(asked.configs, asked.rounds)
        seen.take(asked, answer)
        figures = seen.figures()
        path.append((draw.launches, min(figures, key=figures.__getitem__)))
        try:
            asked = search.send(answer)
        except StopIteration as end:
            found: Found = end.value
            return found


# --- all of them -----------------------------------------------------------------------------------------------------


def available() -> tuple[str, ...]:
    """The names of all strategies that can be replayed here."""
    return (*OURS, EXHAUSTIVE, RANDOM, *peers.kernel_tuner_strategies(), *peers.helion_strategies())


def chosen_strategies(names: Sequence[str] | None) -> tuple[str, ...]:
    """The strategies to replay: ours first, for the launches of the others are counted by it.

    Args:
        names: some of :func:`available`; None takes ours, exhaustive, random, and those of ``PEERS`` that are installed.

    Raises:
        ValueError: there is no strategy of a name, or its package is not installed.
    """
    known = available()
    if names is None:
        names = [*OURS, EXHAUSTIVE, RANDOM, *(name for name in PEERS if name in known)]
    for name in names:
        if name not in known:
            more = "" if peers.kernel_tuner_strategies() and peers.helion_strategies() else f" (more with {peers.INSTALL})"
            raise ValueError(f"strategies names {name!r}; allowed are {', '.join(known)}{more}")
    return tuple(dict.fromkeys([next(iter(OURS)), *names]))


def run(recording: Recording, seeds: int = 10, names: Sequence[str] | None = None, progress: Progress | None = None) -> Json:
    """Replays searches on a recording.

    The same recording, seeds and names give the same figures, except for strategies of other packages that take no seed.

    Args:
        recording: the timings of every candidate.
        seeds: how often each search is replayed for each key.
        names: of the strategies, see :func:`chosen_strategies`; that of our own search is always among them.
        progress: called after each search.

    Returns:
        The content of ``replay.json``. Device and versions are those of the recording.

    Raises:
        ValueError: there is no such strategy, or its package is not installed.
    """
    names, rounds = chosen_strategies(names), recording.rounds
    tallies = {name: _Tally(rounds, {one.key: [] for one in recording.keys}) for name in names}
    total, done, begin = seeds * len(recording.keys) * len(names), 0, time.monotonic()
    for seed in range(seeds):
        chosen: dict[str, dict[Key, LaunchConfig]] = {name: {} for name in OURS}
        for one in recording.keys:
            launches = 0
            for name in names:
                tally = tallies[name]
                if name in OURS:
                    follows = one.key._replace(dtype=recording.keys[0].key.dtype) in chosen[name]
                    found = ours(one, rounds, seed, space.hints(one.key, chosen[name]), OURS[name], follows)
                    chosen[name][one.key] = found.chosen
                    launches = launches or found.launches
                    tally.found[one.key].append(found)
                elif not tally.failure:
                    tally.add(name, one, seed, launches)
                done += 1
                if progress is not None:
                    left = (time.monotonic() - begin) / done * (total - done)
                    progress(total, done, f"{title(name)}, seed {seed}, {' '.join(map(str, one.key))}", left)
    return {
        "schema": 1,
        "command": "replay",
        "source": recording.name,
        "device": recording.device,
        "versions": recording.versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": seeds,
        "rounds": {"truth": (rounds + 1) // 2, "searched": rounds // 2},
        "full_launches": f"{rounds} rounds of every candidate that can be timed, where those with the same binary are one",
        "strategies": [_summary(name, recording.keys, tally) for name, tally in tallies.items() if not tally.failure],
        "left_out": [{"key": key._asdict(), "reason": "the default was not timed"} for key in recording.left_out],
        "failed": [{"name": title(name), "reason": tally.failure} for name, tally in tallies.items() if tally.failure],
    }


@dataclass
class _Tally:
    """What came of a strategy so far: key -> one search for each seed; or why it is left out."""

    rounds: int
    found: dict[Key, list[Replayed]]
    failure: str = ""

    def add(self, name: str, recorded: Recorded, seed: int, launches: int) -> None:
        if name == EXHAUSTIVE:
            replayed = exhaustive(recorded, self.rounds, seed)
        elif name == RANDOM:
            replayed = at_random(recorded, self.rounds, seed, launches)
        else:
            try:
                replayed = of_peer(name, recorded, self.rounds, seed, launches)
            except Exception as error:
                # a fault of another package must not take hours of work with it
                self.failure = f"{type(error).__name__}: {error}"
                return
        self.found[recorded.key].append(replayed)


def title(name: str) -> str:
    """The name of a strategy for a reader."""
    fixed = {"coordroute-quick": "coordroute, quick", EXHAUSTIVE: "exhaustive (triton.autotune)"}
    if name in fixed or name in (*OURS, RANDOM):
        return fixed.get(name, name)
    return f"{_package(name)[0]} {name}"


def _package(name: str) -> tuple[str, str]:
    """Whose a strategy of another package is, and its version. Theirs in camel case are Helion's."""
    whose, package = ("Helion", "helion") if name != name.lower() else ("Kernel Tuner", "kernel_tuner")
    return whose, metadata.version(package)


def _text(name: str) -> str:
    """What a strategy does, in a sentence."""
    if name in OURS:
        plan = OURS[name]
        begin = (
            "all shapes of a launch, after the first dtype of what lies beside the default," if plan.every_shape else "a few seeds"
        )
        return (
            f"{plan.first_rounds} rounds of {begin} and of what neighbouring keys use, then of the neighbours of the best "
            f"{plan.centres}, {plan.refinements} times at most; {plan.contender_rounds} rounds more of the up to {plan.contenders} "
            f"that are close, and {plan.doubt_rounds} of those whose place is in doubt, {plan.doubts} times at most; at last "
            f"{FINAL_ROUNDS} rounds against the default, which stays unless it is surely beaten."
        )
    if name == EXHAUSTIVE:
        return (
            "Every candidate for all the rounds that a search may see, as triton.autotune does; the least median is taken. Every "
            "seed sees the same rounds, so that it cannot but agree."
        )
    if name == RANDOM:
        return f"Candidates in random order, {SAMPLES} rounds of each, with as many launches as coordroute took."
    whose, version = _package(name)
    return (
        f"{name} of {whose} {version}, {SAMPLES} samples of each candidate that it asks for, with as many launches as coordroute "
        "took at most."
    )


def _summary(name: str, recorded: list[Recorded], tally: _Tally) -> Json:
    keys, regrets, shares, paths = [], [], [], []
    for one in recorded:
        found, full = tally.found[one.key], tally.rounds * len(one.samples)
        regret = [round(one.regret(replayed.chosen), 6) for replayed in found]
        share = [round(replayed.launches / full, 6) for replayed in found]
        most = Counter(one.same[replayed.chosen] for replayed in found).most_common(1)[0][1]
        keys.append(
            {
                "key": one.key._asdict(),
                "candidates": len(one.samples),
                "regret": regret,
                "share": share,
                "agreement": round(most / len(found), 6),
                "chosen": [one.candidates.index(replayed.chosen) for replayed in found],
            }
        )
        regrets += regret
        shares += share
        paths += [list(_path(one, replayed, full)) for replayed in found]
    return {
        "name": title(name),
        "text": _text(name),
        "keys": keys,
        "regret": {"median": round(statistics.median(regrets), 6), "p95": quantile(regrets, 0.95), "worst": max(regrets)},
        "share": {"median": round(statistics.median(shares), 6), "worst": max(shares)},
        "stable": round(sum(key["agreement"] == 1 for key in keys) / len(keys), 6),
        "most_rounds": max(replayed.rounds for found in tally.found.values() for replayed in found),
        "curve": _curve(paths, max(shares)),
    }


def _path(recorded: Recorded, replayed: Replayed, full: int) -> Iterator[tuple[float, float]]:
    """From which share of the launches on a search would have which regret; before it knows anything it has the default."""
    yield 0.0, recorded.regret(recorded.default)
    for launches, config in replayed.path:
        yield launches / full, recorded.regret(config)


def _curve(paths: list[list[tuple[float, float]]], end: float) -> list[list[float]]:
    """Share of the launches, median and 95th percentile of the regret there; up to where all searches are at their end."""
    curve = []
    for share in CURVE:
        regrets = [next(regret for at, regret in reversed(path) if at <= share) for path in paths]
        curve.append([round(share, 6), round(statistics.median(regrets), 6), round(quantile(regrets, 0.95), 6)])
        if share >= end:
            break
    return curve
