"""The tuning run: for every key compile → time → prove → time again → the entry that is written.

The work comes in items, a few groups each (one operator, dtype and bucket, both directions). For an item:

1. the search of each direction (``strategies.py``) asks for candidates. They are compiled in parallel processes, ahead where it
   is known what will be asked for; what spills or does not compile is dropped, and of equal binaries one is timed. Several
   groups are searched at a time, so that one is timed while another is compiled;
   A form of configuration that no key of the operator has must gain 3 % to be taken, a seventeenth 10 % (``space.familiar``);
2. ``coordinate_descent``: another number of checkpoint segments is taken only if both directions together gain by it;
3. forward and backward that were found are joined and proved (``proof.py``), as is the pair of defaults. Nothing is timed
   meanwhile. Where a proof fails, the next best candidate takes the place of the one to blame;
4. what was proved meets the default in a last race, from which the reported figures come. It is taken only if the paired 95 %
   interval of its time over the default's lies below 1; otherwise the default stays.

Timing is done by a process of its own (``timer.py``). Whatever cost time is in a journal beside the output file, so that an
interrupted run goes on where it was. Under torchrun the items are handed out to one process a GPU (``crew.py``).

Where the output file has a choice for both directions of a group whose proofs do not hold any more, for the kernel or a version
has changed, nothing is searched: only that and the default are proved and timed, while what the next items launch is compiled.
Groups whose proofs hold are then left as they are. ``fresh`` looks at all candidates again.

A configuration serves all rows and lengths down to the next key. So on a GPU the best few of a search are raced between this key
and the next too, with fewer and shorter rows, and are preferred by both; and what comes of that is raced there against the default
as in step 4. It is taken if it gains at its key and does not lose more between, or if it does not lose at its key and gains
between. What was chosen before is not raced there again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..kernels import config as kernel_config
from ..kernels.config import DIRECTIONS, Key, LaunchConfig
from ..reports.evidence import Form
from . import device as devices
from . import space, store, strategies, timing
from .binaries import FORMS, Compiled
from .crew import Crew
from .fingerprint import kernel_sha256
from .journal import Journal, journal_path
from .proof import Proved, most_rows
from .space import Group
from .strategies import Answer, Ask, Found
from .timer import Timer, processes
from .worker import PROGRAM, WARM, Account, Failure, Inline, Json, Pool, compile_request, prepare_request, prove_request

T = TypeVar("T")

Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

CPU_SECONDS = {"quick": 140.0, "full": 900.0}
"""What a search on a CPU may take in all. Keys that do not fit into it are left to the heuristic and counted."""

COMPILE_SECONDS = 25.0
"""What a compiled CPU candidate is reckoned to cost."""

SEGMENT_GAIN = 0.99
"""Another number of checkpoint segments must bring forward and backward together below this share."""

SEGMENT_TIE = 1.005
"""Within this of the best sum, the fewest segments are taken: they keep the least memory."""

AT_A_TIME = 16
"""Groups that are searched at a time: while one waits for the compiler, others are timed. A compile takes 1 to 5 s."""

ITEM = 24
"""Groups in an item, at most. They are proved together, while nothing is timed."""

SPARE = 2
"""The priority of compiling what may not be needed; what is waited for has less, what later items need has more."""

SURELY_FASTER = 0.98
"""Where both directions are below this share of the default's time, the default is not proved unless it is taken after all."""

SURPRISE = 1.1
"""Where the ratio of the last race is so many times that of the search, or the other way round, it is run again."""

BETWEEN_ROUNDS = 9
"""Rounds of the race between the keys in a search."""

CONTENDERS, CONTEND = 4, 1.03
"""How many candidates are raced between the keys at most, and within which factor of the best at the key."""

ALTERNATIVES = 3
"""How many further candidates of a direction are tried where a proof fails, before the default is left."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        search: rounds of the search.
        segment_rounds: rounds for the numbers of checkpoint segments.
        final_rounds: rounds of the last race.
        sample_us: how long one sample lasts at least, in microseconds.
        ask_seconds: no ask goes on for longer than this after its first round; on a GPU there is no need.
        between: whether what is taken is raced at a length between the keys too.
    """

    search: strategies.Plan
    segment_rounds: int
    final_rounds: int
    sample_us: float
    ask_seconds: float | None = None
    between: bool = False


_PLANS = {
    ("triton", "quick"): Plan(strategies.QUICK, 7, 25, 250.0, between=True),
    ("triton", "full"): Plan(strategies.FULL, 9, 41, 300.0, between=True),
    ("cpu", "quick"): Plan(strategies.QUICK, 3, 15, 1500.0, 2.0),
    ("cpu", "full"): Plan(strategies.FULL, 5, 25, 3000.0, 6.0),
}


class OutOfTime(Exception):
    """The time that a search may take is used up."""


class KeyStatus(NamedTuple):
    """Where the search of a key stands, for a table.

    Attributes:
        key: the key.
        state: "searching", "searched", "proving", "tuned", "default" or "left out".
        best_us: the least median so far in microseconds; None where nothing was timed.
        gain: the default's time over the best's; None likewise.
    """

    key: Key
    state: str
    best_us: float | None = None
    gain: float | None = None


Watch = Callable[[KeyStatus], None]


def run(
    device: torch.device | str | None = None,
    effort: str = "quick",
    output: Path | str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    *,
    groups: list[Group] | None = None,
    seconds: float | None = None,
    workers: int | None = None,
    seed: int = 0,
    watch: Watch | None = None,
    crew: Crew | None = None,
    program: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Tunes a device and writes its configuration file, item by item.

    Args:
        device: what to tune; None is the GPU where there is one, else the CPU.
        effort: ``"quick"`` (few keys and candidates: minutes) or ``"full"``.
        output: the file; None is where lookups find it (:func:`coordroute.autotune.store.output_path`).
        fresh: begin anew instead of going on with an interrupted run.
        progress: called with (total, done, text, seconds left or None).
        groups: tune only these; None is all of the effort.
        seconds: a limit for the whole run; None is :data:`CPU_SECONDS` on a CPU and none on a GPU.
        workers: processes that compile and verify; None is all cores but two, at most 14, on a GPU, and one on a CPU, which
            times too. 0 does everything in this process.
        seed: of all inputs.
        watch: called whenever a key gets on.
        crew: the processes to share the work with; each writes the whole file at the end, whoever of the others has died.
        program: the command line of a worker; None is the package's own.

    Returns:
        The evidence as it goes into autotune.json.

    Raises:
        ValueError: an argument or an environment variable is not one that is allowed.
        WorkerError: a worker process does not start.
        KeyboardInterrupt: passed on; what was measured is kept.
    """
    if effort not in space.EFFORTS:
        raise ValueError(f"effort is {effort!r}; allowed is {' or '.join(space.EFFORTS)}")
    begin = time.monotonic()
    device = devices.as_device(device)
    path = Path(output) if output is not None else store.output_path(device)
    if path.is_dir():
        raise ValueError(f"output is {str(path)!r}, which is a folder; the path of a .json file is needed")
    if groups is None:
        groups = space.groups(devices.backend(device), effort)
    search = _Search(device, effort, path, fresh, groups, seconds, workers, seed, crew, program)
    search.progress, search.watch = progress, watch
    search.run()
    store.reload()
    return search.result(time.monotonic() - begin)


def _fingerprint(device: Json, versions: Json, backend: str, effort: str) -> str:
    """Of what a journal's answers depend on."""
    kernels = {op: kernel_sha256(op, backend) for op in kernel_config.OPS}
    text = json.dumps([device, versions, kernels, effort], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_workers(backend: str) -> int:
    """Processes that compile and verify: all cores but two, at most 14, on a GPU; one, which times too, on a CPU."""
    return min(14, max(1, devices.usable_cores() - 2)) if backend == "triton" else 1


# --- one direction of a group ----------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """What became of a candidate.

    Attributes:
        config: the candidate.
        status: "timed", or why it was dropped.
        reason: for a person; "" where it is timed.
        median_us: of all its samples; None where there are none.
        registers, spills, occupancy: as the compiler reports; None on a CPU.
        compile_seconds: what compiling took in its process; next to nothing where the compiler's cache had it.
        same_as: the candidate of the same binary whose samples these are, or None.
    """

    config: LaunchConfig
    status: str
    reason: str = ""
    median_us: float | None = None
    registers: int | None = None
    spills: int | None = None
    occupancy: float | None = None
    compile_seconds: float = 0.0
    same_as: LaunchConfig | None = None

    def to_json(self) -> Json:
        return {
            "config": self.config.to_json(),
            "status": self.status,
            "reason": self.reason,
            "median_us": None if self.median_us is None else round(self.median_us, 4),
            "registers": self.registers,
            "spills": self.spills,
            "occupancy": self.occupancy,
            "compile_seconds": self.compile_seconds,
            "same_as": None if self.same_as is None else self.same_as.to_json(),
        }


@dataclass
class Track:
    """One direction of a group while it is searched.

    Attributes:
        key: what is searched.
        default: the heuristic's configuration.
        known: what an earlier run has chosen, or None.
        samples: of each candidate the times in microseconds.
        candidates: what became of each.
        binaries: of each binary the first candidate that has it.
        asked: how often the search has asked.
        ranked: what may be taken, in the order in which it is tried; without its checkpoint segments until those are chosen.
        preferred: the same as it would be if it were no matter how many forms an operator has.
        ratios: of each candidate the time over the default's at the key.
        figures: what they are preferred by: that, and of those that were raced between the keys the mean of both.
        launches: how many were timed.
    """

    key: Key
    default: LaunchConfig
    known: LaunchConfig | None
    samples: dict[LaunchConfig, list[float]] = field(default_factory=dict)
    candidates: dict[LaunchConfig, Candidate] = field(default_factory=dict)
    binaries: dict[str, LaunchConfig] = field(default_factory=dict)
    asked: int = 0
    ranked: list[LaunchConfig] = field(default_factory=list)
    preferred: list[LaunchConfig] = field(default_factory=list)
    ratios: dict[LaunchConfig, float] = field(default_factory=dict)
    figures: dict[LaunchConfig, float] = field(default_factory=dict)
    launches: int = 0

    @property
    def name(self) -> str:
        return label(self.key)

    def drop(self, config: LaunchConfig, status: str, reason: str) -> None:
        """Notes why a candidate was dropped."""
        candidate = self.candidates.setdefault(config, Candidate(config, status))
        candidate.status, candidate.reason = status, reason

    def untimed(self, config: LaunchConfig, status: str, reason: str) -> None:
        """Notes why a candidate cannot be timed, and with it those of the same binary."""
        self.drop(config, status, reason)
        for candidate in self.candidates.values():
            if candidate.same_as == config:
                candidate.status, candidate.reason = status, reason

    def best(self) -> tuple[float | None, float | None]:
        medians = {config: statistics.median(found) for config, found in self.samples.items() if found}
        if self.default not in medians:
            return None, None
        return min(medians.values()), medians[self.default] / min(medians.values())


def _candidate_name(key: Key, config: LaunchConfig) -> str:
    return json.dumps([key, config.to_json()], sort_keys=True)


def label(key: Key) -> str:
    return f"{key.op} {key.direction} {key.dtype} {key.rows}x{key.n}"


_NOTHING = Ask((), 0)


@dataclass
class Hunt:
    """A group while it is searched: a generator that asks, and what it waits for."""

    group: Group
    tracks: dict[str, Track]
    deadline: float
    steps: Generator[tuple[str, Ask], Answer, None]
    beside: dict[str, Track] = field(default_factory=dict)
    direction: str = ""
    ask: Ask = _NOTHING
    compiles: dict[LaunchConfig, Future[Compiled]] = field(default_factory=dict)

    @property
    def asking(self) -> Track:
        """What the present ask is about; that of a direction between the keys is called "<direction> between"."""
        return self.beside[self.direction] if self.direction in self.beside else self.tracks[self.direction]

    def ready(self) -> bool:
        return all(future.done() for future in self.compiles.values())


# --- the run ---------------------------------------------------------------------------------------------------------


class _Search:
    def __init__(
        self,
        device: torch.device,
        effort: str,
        path: Path,
        fresh: bool,
        groups: list[Group],
        seconds: float | None,
        workers: int | None,
        seed: int,
        crew: Crew | None,
        program: Sequence[str] | None,
    ) -> None:
        self.device, self.effort, self.path, self.seed, self.crew = device, effort, path, seed, crew
        self.backend = devices.backend(device)
        self.plan = _PLANS[self.backend, effort]
        self.description, self.versions = devices.describe(device), devices.versions()
        self.workers = default_workers(self.backend) if workers is None else workers
        rank, ranks = (crew.rank, crew.world_size) if crew else (0, 1)
        fingerprint = _fingerprint(self.description, self.versions, self.backend, effort)
        self.journal = Journal(journal_path(path, rank), fingerprint, fresh, ranks)
        self.known = {} if fresh else store.outdated(path, self.backend, self.description, self.versions)
        self.kept = self._kept(groups)
        self.groups = groups = [group for group in groups if group.label() not in self.kept]
        if all(map(self.chosen_before, groups)):
            # no search needs their order; the proofs of long rows take long, and are made side by side
            groups.sort(key=lambda group: group.n, reverse=True)
        asked = {group.key(direction) for group in groups for direction in DIRECTIONS}
        self.stays = {key: config for key, config in store.chosen(path, self.description).items() if key not in asked}
        self.tuned = asked | self.stays.keys()
        self.journal.note("asked", "", [*self.others(), *(group.label() for group in groups)])
        self.progress: Progress | None = None
        self.watch: Watch | None = None
        self.began = time.monotonic()
        if seconds is None and self.backend == "cpu":
            seconds = CPU_SECONDS[effort]
        self.deadline = math.inf if seconds is None else self.began + seconds
        self.program = PROGRAM if program is None else program
        self.results: dict[str, list[Json]] = {}
        self.out_of_time: list[Group] = []
        self.resumed = 0
        world = crew.world_size if crew else 1
        size = 1 if self.backend == "cpu" else max(1, min(ITEM, math.ceil(len(groups) / (3 * world if world > 1 else 1))))
        self.items = [groups[begin : begin + size] for begin in range(0, len(groups), size)]
        self.total, self.done = 4 * len(groups), 0
        self.compiling: dict[str, Future[Compiled]] = {}
        self.chosen: dict[Key, LaunchConfig] = {}
        self.found: dict[Key, LaunchConfig] = {}
        self.phases: Counter[str] = Counter()
        self.prepared: dict[str, tuple[int, Future[Json | Failure]]] = {}

    def _kept(self, groups: list[Group]) -> set[str]:
        """Groups that are not outdated while others are: there is nothing to do for them.

        What an interrupted run had kept is kept by the one that goes on with it, which may find nothing outdated any more.
        """
        known = self.journal.get("kept", "")
        if known is None and any(map(self.chosen_before, groups)):
            with contextlib.suppress(OSError, store.InvalidFile):
                usable = store.read(self.path).configs.keys() - self.known.keys()
                known = [
                    group.label()
                    for group in groups
                    if all(group.key(direction) in usable for direction in DIRECTIONS)
                    and self.journal.get("group", group.label()) is None
                ]
                if known:
                    self.journal.put("kept", "", known)
        return set(known or ())

    def chosen_before(self, group: Group) -> bool:
        """Whether an earlier run has chosen for both directions, and is only outdated: proofs and times are to be made anew."""
        return all(group.key(direction) in self.known for direction in DIRECTIONS)

    # progress

    def say(self, text: str, steps: int = 0) -> None:
        self.done += steps
        if self.progress is None:
            return
        spent = time.monotonic() - self.began
        left = spent / self.done * (self.total - self.done) if self.done >= 3 else None
        if left is not None and self.deadline < math.inf:
            left = min(left, max(0.0, self.deadline - time.monotonic()))
        self.progress(self.total, min(self.done, self.total), text, left)

    def show(self, track: Track, state: str, figures: tuple[float | None, float | None] | None = None) -> None:
        if self.watch is not None:
            self.watch(KeyStatus(track.key, state, *(track.best() if figures is None else figures)))

    # the run

    def run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                self.pool, self.timer = self._processes(stack)
                if self.crew is None:
                    for i in range(len(self.items)):
                        self.ahead(i, 1)
                        self.item(i)
                else:
                    self.shared(self.crew)
        except BaseException:
            self.journal.close()
            raise
        if self.others():
            self.journal.close()
        else:
            self.journal.remove()

    def others(self) -> list[str]:
        """What an interrupted run has still to do that this one was not asked for: it is to go on from the journal, too."""
        mine = {group.label() for group in self.groups}
        asked = self.journal.get("asked", "") or ()
        return [name for name in asked if name not in mine and self.journal.get("group", name) is None]

    def _processes(self, stack: contextlib.ExitStack) -> tuple[Pool | Inline, Timer]:
        pool, timer = processes(stack, self.device, self.workers, self.seed, self.plan.sample_us, self.program)
        for _ in range(3 * self.workers if isinstance(pool, Pool) else 0):
            pool.submit(WARM, 3)  # none is told apart: most get one
        return pool, timer

    def shared(self, crew: Crew) -> None:
        crew.agree("items", json.dumps([self.journal.fingerprint, self.items]))
        while (i := crew.claim(len(self.items))) is not None:
            self.ahead(i, crew.world_size)
            self.item(i)
            found = {group.label(): self.results[group.label()] for group in self.items[i] if group.label() in self.results}
            crew.finish(i, json.dumps(found))
        self.say("waiting for the other processes")
        for text in crew.results(len(self.items)):
            self.results |= json.loads(text)
        # each writes the same, for the others may have died
        self.save(self.groups)

    def save(self, groups: Iterable[Group]) -> None:
        """Writes the entries of groups. What is outdated in the file and could not be proved anew goes."""
        results = [result for group in groups for result in self.results.get(group.label(), [])]
        entries = [result["entry"] for result in results if result["entry"] is not None]
        gone = {Key(**result["key"]) for result in results if result["entry"] is None} & self.known.keys()
        if entries or gone:
            store.save(self.path, self.description, self.versions, entries, gone)

    def item(self, position: int) -> None:
        todo = []
        for group in self.items[position]:
            known = self.journal.get("group", group.label())
            if known is None:
                todo.append(group)
                continue
            self.results[group.label()] = known
            self.resumed += 2
            self.remember(known)
            self.say("", 4)
        if todo and time.monotonic() > self.deadline:
            self.leave_out(todo)
            return
        begin = time.monotonic()
        hunts = self.searched(todo)
        self.spent("search", begin)
        for name, results in (self.finished(hunts) if hunts else {}).items():
            self.results[name] = results
            self.journal.put("group", name, results)
            self.remember(results)
        if self.crew is None:
            self.save(self.items[position])

    def spent(self, phase: str, begin: float) -> None:
        self.phases[phase] += time.monotonic() - begin  # type: ignore[assignment]

    def leave_out(self, groups: list[Group]) -> None:
        self.out_of_time += groups
        self.say("", 4 * len(groups))

    def remember(self, results: list[Json]) -> None:
        for result in results:
            if result["config"] is not None:
                key = Key(**result["key"])
                self.chosen[key] = self.found[key] = LaunchConfig.from_json(result["config"])

    # the space

    def track(self, group: Group, direction: str) -> Track:
        key = group.key(direction)
        known = self.known[key].config if self.chosen_before(group) else None
        return Track(key, kernel_config.heuristic(key, self.backend), known)

    def seeds(self, track: Track) -> list[LaunchConfig]:
        """Where a search begins, beside the default and the hints."""
        if track.known is not None:
            return [track.known]
        if self.hinted(track):
            return []
        return space.seeds(track.key, self.backend)

    def follows(self, track: Track) -> bool:
        """Whether this shape is searched in another dtype first."""
        first = self.first(track.key)
        if self.backend != "triton" or first == track.key or track.known is not None:
            return False
        # what another process found is not known here
        return first in self.found or (self.crew is None and any(first == one.key(first.direction) for one in self.groups))

    def hinted(self, track: Track) -> bool:
        """Whether a quick search of this shape is left at what was found for the first dtype."""
        return self.effort == "quick" and self.follows(track)

    def first(self, key: Key) -> Key:
        """The key of the same shape in the dtype that is tuned first."""
        return key._replace(dtype=self.groups[0].dtype)

    def space_of(self, track: Track) -> list[LaunchConfig]:
        return space.candidates(track.key, self.backend, self.effort if self.backend == "cpu" else "full")

    def hints(self, track: Track) -> list[LaunchConfig]:
        """What the nearest keys of the same operator and direction use, fitted to this key's length."""
        if self.hinted(track):
            found = self.found.get(self.first(track.key))
            return [] if found is None else [space.with_segments(found, track.default.checkpoint_segments)]
        near = space.hints(track.key, self.chosen)
        return list(dict.fromkeys(space.with_segments(config, track.default.checkpoint_segments) for config in near))

    # 1. and 2.: the search

    def ahead(self, position: int, step: int) -> None:
        """Compiles where the searches of an item will begin, then what the proofs launch that are likely to be needed, and then
        the same for the items that are likely to be the next here.

        Where there is nothing to search these are the proofs of what an earlier run has chosen, of two further items; else those of
        the defaults, of no further one.
        """
        if self.backend == "cpu":
            return
        for priority, at in ((1, position), (3, position + step), (4, position + 2 * step)):
            for group in self.items[at] if at < len(self.items) else ():
                before = self.chosen_before(group)
                if self.journal.get("group", group.label()) is not None or (priority == 4 and not before):
                    continue
                tracks = [self.track(group, direction) for direction in DIRECTIONS]
                for track in tracks:
                    for config in dict.fromkeys([track.default, *self.seeds(track)]):
                        # the proof of what was chosen before launches the same, but where programs share rows: fewer of more
                        if config != track.known or config.variant == "split":
                            self.compile(track, config, priority)
                if before:
                    self.prepare_pair(group, [track.known for track in tracks if track.known is not None], priority)
                elif priority == 1:
                    self.prepare_pair(group, [track.default for track in tracks], SPARE)

    def compile(self, track: Track, config: LaunchConfig, priority: int) -> Future[Compiled]:
        name = _candidate_name(track.key, config)
        found = self.compiling.get(name)
        if found is not None:
            return found
        found = Future()
        self.compiling[name] = found
        known = self.journal.get("compiled", name)
        if known is not None or self.backend == "cpu":
            found.set_result(Compiled(*known) if known is not None else Compiled("ok"))
            return found

        def done(answer: Future[Json | Failure], found: Future[Compiled] = found) -> None:
            if answer.cancelled():
                found.cancel()
            elif (error := answer.exception()) is not None:
                found.set_exception(error)
            else:
                result = answer.result()
                found.set_result(Compiled(*result) if isinstance(result, Failure) else Compiled(**result))

        is_default = config == space.with_segments(track.default, config.checkpoint_segments)
        self.pool.submit(compile_request(track.key, config, is_default), priority).add_done_callback(done)
        return found

    def searched(self, groups: list[Group]) -> dict[str, Hunt]:
        """Searches groups, a few at a time."""
        waiting, active, done = list(groups), list[Hunt](), dict[str, Hunt]()
        while waiting or active:
            while waiting and len(active) < (AT_A_TIME if self.backend == "triton" else 1):
                first = waiting[0]._replace(dtype=self.groups[0].dtype)
                if any(one.group == first for one in active):
                    break  # what it finds is needed
                hunt = self.hunt(waiting.pop(0), len(waiting) + 1)
                if self.advance(hunt, None):
                    active.append(hunt)
                else:
                    done[hunt.group.label()] = hunt
            hunt = next((one for one in active if one.ready()), active[0]) if active else None  # type: ignore[assignment]
            if hunt is None:
                continue
            if not hunt.ready():
                wait([future for one in active for future in one.compiles.values() if not future.done()], 1.0, "FIRST_COMPLETED")
                continue
            try:
                going = self.advance(hunt, self.answer(hunt))
            except OutOfTime:
                self.close(hunt)
                active.remove(hunt)
                self.leave_out([hunt.group])
                continue
            if not going:
                active.remove(hunt)
                done[hunt.group.label()] = hunt
                self.found |= {track.key: track.ranked[0] for track in hunt.tracks.values() if track.ranked}
                self.prepare(hunt)
        return done

    def prepare(self, hunt: Hunt) -> None:
        """Compiles what the proofs of a group will launch, while others are still searched."""
        tracks = list(hunt.tracks.values())
        if all(track.ranked for track in tracks):
            self.prepare_pair(hunt.group, [track.ranked[0] for track in tracks], 1)

    def prepare_pair(self, group: Group, pair: Sequence[LaunchConfig], priority: int) -> list[Future[Json | Failure]]:
        """Compiles what the proof of a pair launches, each form of each direction once: keys of one length share them.

        What is asked for more urgently than before, and not begun, goes to the front.
        """
        found: list[Future[Json | Failure]] = []
        if self.backend == "cpu" or self.workers == 0:
            return found
        for direction, config in zip(DIRECTIONS, pair, strict=True):
            for form in range(FORMS[direction]):
                most = most_rows(config, group.rows) if direction == "forward" else None
                request = prepare_request(group.op, group.dtype, group.n, direction, config, form, most)
                text = json.dumps(request, sort_keys=True)
                before, future = self.prepared.get(text, (math.inf, None))
                if future is None or future.cancelled() or (priority < before and future.cancel()):
                    future = self.pool.submit(request, priority)
                    self.prepared[text] = priority, future
                found.append(future)
        return found

    def default_needed(self, hunt: Hunt, chosen: Sequence[LaunchConfig]) -> bool:
        """Whether the pair of defaults may well be taken in the end, so that it is proved with the others.

        A direction that has the default anyway is proved with the pair that was chosen. What was chosen in an earlier run beat
        the default there.
        """
        tracks = list(hunt.tracks.values())
        if all(config == track.default for track, config in zip(tracks, chosen, strict=True)):
            return True
        if all(track.known is not None for track in tracks):
            return False
        return not all(
            config == track.default
            or track.ratios.get(space.with_segments(config, track.default.checkpoint_segments), 1.0) < SURELY_FASTER
            for track, config in zip(tracks, chosen, strict=True)
        )

    def hunt(self, group: Group, left: int) -> Hunt:
        deadline = math.inf
        if self.deadline < math.inf:
            rest = sum(map(len, self.items)) - len(self.results) - len(self.out_of_time)
            deadline = time.monotonic() + (self.deadline - time.monotonic()) / max(rest, left, 1) * 1.5
        tracks = {direction: self.track(group, direction) for direction in DIRECTIONS}
        beside = {f"{direction} between": self.beside(track) for direction, track in tracks.items()} if self.plan.between else {}
        for track in (*tracks.values(), *beside.values()):
            self.timer.open(track.name, track.key)
        return Hunt(group, tracks, min(deadline, self.deadline), self.steps(group, tracks), beside)

    def close(self, hunt: Hunt) -> None:
        for track in (*hunt.tracks.values(), *hunt.beside.values()):
            self.timer.close(track.name)

    def steps(self, group: Group, tracks: dict[str, Track]) -> Generator[tuple[str, Ask], Answer, None]:
        """All asks of a group; leaves in each track what may be taken, the preferred first. Nothing where the default fails."""
        for direction, track in tracks.items():
            self.show(track, "searching", (None, None))
            if track.known is not None:
                track.ranked = [track.known]
                self.show(track, "searched")
                self.say(f"chosen before: {track.name}", 1)
                continue
            hints = self.hints(track)
            plan = strategies.after(self.plan.search) if self.follows(track) else self.plan.search
            search = strategies.local_race(track.default, self.seeds(track), self.space_of(track), hints, plan)
            with contextlib.suppress(strategies.DefaultFailed):
                found = yield from _tagged(direction, search)
                track.ranked, track.ratios, track.figures = found.ranked, found.ratios, found.ratios
                if self.plan.between:
                    yield from self.between(direction, track, hints)
                track.preferred = track.ranked
                if self.backend == "triton":
                    track.ranked = self.familiar(track, self.forms(group.op))
            self.show(track, "searched")
            self.say(f"searched {track.name}", 1)
        if all(track.ranked and track.known is None for track in tracks.values()):
            yield from self.segments(group, tracks)

    def between(self, direction: str, track: Track, hints: Sequence[LaunchConfig]) -> Generator[tuple[str, Ask], Answer, None]:
        """Races the best few of a direction between the keys; what is best at both comes first then."""
        best = min(track.ratios.values())
        few = [config for config in track.ranked if track.ratios[config] <= CONTEND * best][:CONTENDERS]
        if few == [track.default]:
            return
        asked = Ask(tuple(dict.fromkeys([track.default, *few])), BETWEEN_ROUNDS)
        answer = yield f"{direction} between", asked
        track.launches += sum(map(len, answer.values()))
        if track.default not in answer:
            return
        base = answer[track.default]
        means = {one: math.sqrt(track.ratios[one] * strategies.ratio(answer[one], base)) for one in few if one in answer}
        if means:
            first = strategies.preferred(means, track.default, hints, self.plan.search)
            track.ranked = [*first, *(config for config in track.ranked if config not in means)]
            track.figures = track.ratios | means

    def forms(self, op: str) -> set[Form]:
        """The forms of configurations that keys of an operator have: the defaults', what the items before this have chosen, and
        what the file has for keys that are not tuned now.

        Not what other groups of the item have found so far, for which are found first is chance.
        """
        keys = (group.key(direction) for group in self.groups if group.op == op for direction in DIRECTIONS)
        defaults = (kernel_config.heuristic(key, self.backend) for key in keys)
        chosen = (config for key, config in (*self.stays.items(), *self.chosen.items()) if key.op == op)
        return {space.form(config) for config in (*defaults, *chosen)}

    def familiar(self, track: Track, forms: Collection[Form]) -> list[LaunchConfig]:
        """The order in which the candidates of a direction are taken where an operator has these forms."""
        return space.familiar(track.preferred, track.figures, forms, track.default, self.plan.search.keep)

    def agree(self, hunts: dict[str, Hunt]) -> None:
        """Has the groups of an item, in their order, take the same new forms of configurations where that costs little."""
        forms = {op: self.forms(op) for op in kernel_config.OPS}
        for hunt in (hunts[group.label()] for group in self.groups if group.label() in hunts):
            tracks = [track for track in hunt.tracks.values() if track.known is None and track.ranked]
            found = forms[hunt.group.op]
            if any(track.ranked[0].checkpoint_segments != track.default.checkpoint_segments for track in tracks):
                # chosen for both directions together, and on top
                more = found | {space.form(track.ranked[0]) for track in tracks}
                if len(more) <= space.MOST_FORMS:
                    found |= more
                    continue
            for track in tracks:
                track.ranked = self.familiar(track, found)
                found.add(space.form(track.ranked[0]))

    def segments(self, group: Group, tracks: dict[str, Track]) -> Generator[tuple[str, Ask], Answer, None]:
        """Takes another number of checkpoint segments where forward and backward together gain by it."""
        base = tracks["forward"].default.checkpoint_segments
        counts: tuple[int | None, ...] = space.segment_choices(group.op, self.effort)
        if len(counts) < 2:
            return
        sums = dict.fromkeys(counts, 0.0)
        for direction, track in tracks.items():
            configs = {count: space.with_segments(track.ranked[0], count) for count in counts}
            answer = yield direction, Ask(tuple(configs.values()), self.plan.segment_rounds)
            for count, config in configs.items():
                sums[count] += statistics.median(answer[config]) if answer.get(config) else math.inf
        best = min(sums.values())
        if not math.isfinite(best) or best > SEGMENT_GAIN * sums[base]:
            return
        taken = min((count for count in counts if sums[count] <= SEGMENT_TIE * best), key=lambda count: count or 0)
        for track in tracks.values():
            track.ranked = [space.with_segments(config, taken) for config in track.ranked]

    def advance(self, hunt: Hunt, answer: Answer | None) -> bool:
        """Hands an answer on, and begins to compile what is asked for next; False where nothing is."""
        try:
            hunt.direction, hunt.ask = next(hunt.steps) if answer is None else hunt.steps.send(answer)
        except StopIteration:
            self.close(hunt)
            return False
        track = hunt.asking
        hunt.compiles = {config: self.compile(track, config, 0) for config in hunt.ask.configs}
        return True

    def answer(self, hunt: Hunt) -> Answer:
        """Times what is asked for, or finds it in the journal."""
        track, ask = hunt.asking, hunt.ask
        timed, alias = self.compiled(hunt, track)
        name = f"{track.name} {track.asked}"
        track.asked += 1
        wanted = [config.to_json() for config in timed]
        known = self.journal.get("samples", name)
        if known is None or known["configs"] != wanted or known["rounds"] != ask.rounds:
            self.say(f"timing {track.name}")
            seconds = self.plan.ask_seconds
            if hunt.deadline < math.inf:
                if time.monotonic() > hunt.deadline:
                    raise OutOfTime
                seconds = max(0.05, min(seconds or math.inf, hunt.deadline - time.monotonic()))
            samples, failures = self.timer.sample(track.name, timed, ask.rounds, seconds)
            known = {
                "configs": wanted,
                "rounds": ask.rounds,
                "samples": [samples.get(config) for config in timed],
                "failures": [failures.get(config) for config in timed],
            }
            self.journal.put("samples", name, known)
        answer: Answer = {}
        for config, samples, failure in zip(timed, known["samples"], known["failures"], strict=True):
            candidate = track.candidates[config]
            if samples is None:
                track.untimed(config, *failure)
                continue
            answer[config] = samples
            track.launches += len(samples)
            track.samples.setdefault(config, []).extend(samples)
            candidate.median_us = statistics.median(track.samples[config])
        for config, same in alias.items():
            if same in answer:
                answer[config] = answer[same]
                track.candidates[config].median_us = track.candidates[same].median_us
        if hunt.direction in hunt.tracks:
            self.show(track, "searching")
        return answer

    def compiled(self, hunt: Hunt, track: Track) -> tuple[list[LaunchConfig], dict[LaunchConfig, LaunchConfig]]:
        """What of an ask is to be timed, and which candidates are the same as one of these."""
        timed: list[LaunchConfig] = []
        alias: dict[LaunchConfig, LaunchConfig] = {}
        for config in hunt.ask.configs:
            result = hunt.compiles[config].result()
            name = _candidate_name(track.key, config)
            if self.backend == "triton" and self.journal.get("compiled", name) is None:
                self.journal.put("compiled", name, list(result))
            candidate = track.candidates.get(config)
            if candidate is None:
                candidate = self.candidate(track, config)
                if result.status != "ok":
                    candidate.status, candidate.reason = result.status, result.reason
                elif config.variant == "inductor" and hunt.deadline - time.monotonic() < COMPILE_SECONDS:
                    candidate.status, candidate.reason = "out of time", "no time was left to compile it"
                elif result.identity:
                    same = track.binaries.setdefault(result.identity, config)
                    candidate.same_as = None if same == config else same
                    candidate.status, candidate.reason = track.candidates[same].status, track.candidates[same].reason
            if candidate.status != "timed":
                continue
            if candidate.same_as is not None:
                alias[config] = candidate.same_as
                if candidate.same_as not in timed:
                    timed.append(candidate.same_as)
            elif config not in timed:
                timed.append(config)
        return timed, alias

    def compile_for_races(self, hunts: Iterable[Hunt]) -> list[Future[Compiled]]:
        """Begins to compile what the last races time and no search has timed."""
        found: list[Future[Compiled]] = []
        for track in (track for hunt in hunts for track in hunt.tracks.values() if self.backend == "triton"):
            if track.known is not None:
                found += [self.compile(track, config, 1) for config in dict.fromkeys([track.default, track.known])]
        return found

    def candidate(self, track: Track, config: LaunchConfig) -> Candidate:
        """What is told of a candidate, made when it is looked at first, with what the compiler said where it was asked."""
        if config not in track.candidates:
            future = self.compiling.get(_candidate_name(track.key, config))
            result = future.result() if future is not None and future.done() else Compiled("ok")
            report = result.registers, result.spills, result.occupancy, result.seconds
            track.candidates[config] = Candidate(config, "timed", "", None, *report)
        return track.candidates[config]

    # 3. the proofs

    def finished(self, hunts: dict[str, Hunt]) -> dict[str, list[Json]]:
        """Proves what was found in some groups, all at a time, and then times it against the defaults."""
        begin = time.monotonic()
        if self.backend == "triton":
            self.agree(hunts)
        for hunt in hunts.values():
            for track in hunt.tracks.values():
                self.show(track, "proving")
        self.say(f"proving {len(hunts)} groups")
        pairs = self.driven({name: self.proofs(hunt) for name, hunt in hunts.items()}, hunts, 1)
        for priority, future in self.prepared.values():
            if priority == SPARE:
                future.cancel()  # what nobody has begun is not needed any more
        wait(self.compile_for_races(hunts.values()))
        self.spent("prove", begin)
        begin = time.monotonic()
        raced = self.raced(hunts, pairs, "")
        raced = self.few(hunts, pairs, raced, raced)
        # where a default is to be shipped after all it is proved first, and then timed again; nothing is timed meanwhile
        late = {name: self.late_proof(hunts[name]) for name, pair in pairs.items() if self.unproved(hunts[name], pair, raced[name])}
        for name, default in self.driven(late, hunts, 0).items():
            pairs[name] = pairs[name]._replace(default=default)
        raced = self.few(hunts, pairs, raced | self.raced(hunts, {name: pairs[name] for name in late}, " again"), late)
        found = {name: self.settled(hunts[name], pair, raced[name]) for name, pair in pairs.items()}
        self.spent("last race", begin)
        return found

    def driven(self, asking: Mapping[str, Generator[Json, Proved, T]], hunts: dict[str, Hunt], steps: int) -> dict[str, T]:
        """Runs generators that ask for proofs side by side; what a proof launches is compiled first, by several processes.

        Args:
            asking: by the label of a group.
            hunts: likewise.
            steps: by how many each that ends brings the run on.
        """
        results: dict[str, T] = {}
        compiling: list[tuple[list[Future[Json | Failure]], str, Json]] = []
        proving: dict[Future[Json | Failure], tuple[str, Json]] = {}

        def go_on(name: str, found: Proved | None) -> None:
            try:
                request = next(asking[name]) if found is None else asking[name].send(found)
            except StopIteration as stop:
                results[name] = stop.value
                self.say(f"proved {name}", steps)
                return
            known = self.journal.get("proved", json.dumps(request, sort_keys=True))
            if known is not None:
                go_on(name, Proved(*known))
            else:
                pair = [LaunchConfig.from_json(request[direction]) for direction in DIRECTIONS]
                compiling.append((self.prepare_pair(hunts[name].group, pair, 0), name, request))

        for name in asking:
            go_on(name, None)
        while compiling or proving:
            for one in [one for one in compiling if all(future.done() for future in one[0])]:
                compiling.remove(one)
                proving[self.pool.submit(one[2], 0)] = one[1:]
            waiting = {future for futures, _, _ in compiling for future in futures if not future.done()}
            ready, _ = wait({*proving, *waiting}, None, "FIRST_COMPLETED")
            for future in ready & proving.keys():
                name, request = proving.pop(future)
                answer = future.result()
                proved = Proved(*answer) if isinstance(answer, Failure) else Proved(**answer)
                self.journal.put("proved", json.dumps(request, sort_keys=True), list(proved))
                go_on(name, proved)
        return results

    def proofs(self, hunt: Hunt) -> Generator[Json, Proved, _Pair]:
        """What is to be proved in a group: the best pair whose proof holds, and the pair of defaults where one may be taken."""
        forward, backward = hunt.tracks["forward"], hunt.tracks["backward"]
        pair = _Pair(forward.default, backward.default, None, None)
        ones, twos = (_few(track) for track in (forward, backward))
        while ones and twos and (ones[0], twos[0]) != (forward.default, backward.default):
            one, two = ones[0], twos[0]
            found = yield self.request(hunt.group, one, two)
            if found.status == "ok":
                pair = pair._replace(one=one, two=two, found=found)
                break
            # which of them is to blame: each beside the other's default, with as many segments
            segments = one.checkpoint_segments
            with_default = yield self.request(hunt.group, one, space.with_segments(backward.default, segments))
            other = yield self.request(hunt.group, space.with_segments(forward.default, segments), two)
            if with_default.status != "ok" or other.status == "ok":
                ones = _without(forward, ones, found if with_default.status == "ok" else with_default)
            if other.status != "ok" or with_default.status == "ok":
                twos = _without(backward, twos, found if other.status == "ok" else other)
        if pair.found is not None and not self.default_needed(hunt, (pair.one, pair.two)):
            return pair
        default = yield self.request(hunt.group, forward.default, backward.default)
        return pair._replace(default=default)

    def request(self, group: Group, one: LaunchConfig, two: LaunchConfig) -> Json:
        return prove_request(group.op, group.dtype, group.rows, group.n, one, two, self.seed)

    # 4. the last race

    def raced(self, hunts: dict[str, Hunt], pairs: dict[str, _Pair], again: str) -> dict[str, _Raced]:
        """Races of what was chosen in some groups and the defaults; first all at the keys, then what won there between them.

        What the second races launch is compiled while others are raced at the keys.
        """
        found: dict[str, _Raced] = {}
        won: dict[str, dict[str, Track]] = {}
        compiles: list[Future[Compiled]] = []
        for name, pair in pairs.items():
            found[name] = self.final(hunts[name], pair, again)
            won[name] = self.doubtful(hunts[name], pair, found[name])
            for direction, track in won[name].items():
                for config in (track.default, pair.configs()[direction]):
                    compiles.append(self.compile(self.beside(track), config, 0))
        wait(compiles)
        return {name: self.held(hunts[name], pairs[name], raced, won[name], again) for name, raced in found.items()}

    def few(
        self, hunts: dict[str, Hunt], pairs: dict[str, _Pair], raced: dict[str, _Raced], todo: Collection[str]
    ) -> dict[str, _Raced]:
        """What is taken where a form that no key of the operator has must gain in its last race what it gained in the search.

        Of the groups of ``todo`` those that gain most come first. What other groups take stays, and so do what was chosen before
        and another number of checkpoint segments, which is chosen for both directions together. On a CPU forms are not counted.
        """
        if self.backend != "triton":
            return raced
        raced = dict(raced)
        forms = {op: self.forms(op) for op in kernel_config.OPS}
        new = []
        for name, one in raced.items():
            for direction, track in hunts[name].tracks.items():
                config = pairs[name].configs()[direction]
                if not one.taken[direction]:
                    continue
                if name not in todo or track.known is not None or self.other_segments(hunts[name], pairs[name]):
                    forms[track.key.op].add(space.form(config))
                else:
                    new.append((_ratio(one.timed[direction], config, track.default) or 1.0, name, direction, track.key.op, config))
        for ratio, name, direction, op, config in sorted(new, key=lambda found: found[0]):
            if space.form(config) in forms[op] or ratio < space.least_gain(forms[op]):
                forms[op].add(space.form(config))
            else:
                raced[name] = raced[name]._replace(taken=raced[name].taken | {direction: False})
        return raced

    def final(self, hunt: Hunt, pair: _Pair, again: str) -> _Raced:
        """A race of what was chosen and the default at the key, on fresh samples."""
        tracks, configs = hunt.tracks, pair.configs()
        timed = {direction: self.settled_race(track, configs[direction], again) for direction, track in tracks.items()}
        taken = {direction: self.beats(timed[direction], configs[direction], track.default) for direction, track in tracks.items()}
        if self.other_segments(hunt, pair):
            ours, theirs = _sums(timed, tracks, pair)
            taken = dict.fromkeys(taken, bool(ours) and strategies.beats(ours, theirs))
        return _Raced(timed, taken)

    @staticmethod
    def other_segments(hunt: Hunt, pair: _Pair) -> bool:
        """Whether forward and backward have to agree on another number of segments: both are taken, or none is."""
        return pair.one.checkpoint_segments != hunt.tracks["forward"].default.checkpoint_segments

    def doubtful(self, hunt: Hunt, pair: _Pair, raced: _Raced) -> dict[str, Track]:
        """The directions in which what won or did not surely lose is raced between the keys too; not what was chosen before."""
        if not self.plan.between:
            return {}
        found = {}
        for direction, track in hunt.tracks.items():
            config = pair.configs()[direction]
            level = not self.other_segments(hunt, pair) and self.level(raced.timed[direction], config, track.default)
            if track.known is None and (raced.taken[direction] or level):
                found[direction] = track
        return found

    @staticmethod
    def level(timed: dict[LaunchConfig, timing.Timed], config: LaunchConfig, default: LaunchConfig) -> bool:
        """Whether what was chosen does not surely lose to the default."""
        if config == default or config not in timed or default not in timed:
            return False
        return not strategies.beats(timed[default].samples, timed[config].samples)

    def held(self, hunt: Hunt, pair: _Pair, raced: _Raced, won: dict[str, Track], again: str) -> _Raced:
        """What is taken after a race between the keys.

        Of what won at its key, that which does not surely lose more there than it gains; of what did not surely lose at its key,
        that which surely gains there.
        """
        configs = pair.configs()
        between = {direction: self.last_race(self.beside(track), configs[direction], again) for direction, track in won.items()}
        for direction, track in won.items():
            track.launches += sum(len(one.samples) for one in between[direction].values())
        if won and self.other_segments(hunt, pair):
            holds = dict.fromkeys(won, _holds(_sums(raced.timed, hunt.tracks, pair), _sums(between, hunt.tracks, pair)))
        else:
            samples = {
                direction: [
                    [one[config].samples if config in one else [] for config in (configs[direction], track.default)]
                    for one in (raced.timed[direction], between[direction])
                ]
                for direction, track in won.items()
            }
            holds = {direction: _holds(*both) for direction, both in samples.items()}
            for direction, (_, (own, default)) in samples.items():
                if not raced.taken[direction]:
                    holds[direction] = bool(own and default) and strategies.beats(own, default)
        for direction, track in won.items():
            if raced.taken[direction] and not holds[direction]:
                ratio, at = _ratio(between[direction], configs[direction], track.default), self.beside(track).key
                said = "could not be timed" if ratio is None else f"takes {ratio:.3f} of the default's time"
                track.drop(configs[direction], "slower between", f"{said} at {at.rows}x{at.n}")
        return raced._replace(taken=raced.taken | {direction: holds[direction] for direction in won})

    def beside(self, track: Track) -> Track:
        """The same direction at rows and a length between this key and the next."""
        return Track(space.between(track.key, self.tuned), track.default, None)

    @staticmethod
    def proof_of(track: Track, direction: str, pair: _Pair, raced: _Raced) -> Proved | None:
        """What became of the proof of what is to be shipped in one direction; None where there is none yet."""
        if raced.taken[direction]:
            return pair.found
        if (
            pair.configs()[direction] == track.default
            and pair.found is not None
            and not (pair.default and pair.default.status == "ok")
        ):
            return pair.found  # the default of this direction, beside what was chosen for the other
        return pair.default

    def unproved(self, hunt: Hunt, pair: _Pair, raced: _Raced) -> bool:
        """Whether a default is to be shipped of which there is no proof."""
        return any(self.proof_of(track, direction, pair, raced) is None for direction, track in hunt.tracks.items())

    def late_proof(self, hunt: Hunt) -> Generator[Json, Proved, Proved]:
        """Asks for the proof of the pair of defaults."""
        return (yield self.request(hunt.group, hunt.tracks["forward"].default, hunt.tracks["backward"].default))

    def settled(self, hunt: Hunt, pair: _Pair, raced: _Raced) -> list[Json]:
        """What is shipped and told of a group."""
        choices: list[_Choice | None] = []
        for direction, track in hunt.tracks.items():
            found, proved = raced.timed[direction], self.proof_of(track, direction, pair, raced)
            chosen = pair.configs()[direction] if raced.taken[direction] else track.default
            proof = getattr(proved, direction, None)
            if proof is None or track.default not in found:
                if proved is not None and proved.status != "ok":
                    track.drop(chosen, proved.status, proved.reason)
                choices.append(None)
            else:
                choices.append(_Choice(chosen, proof, found[chosen], found[track.default]))
        self.say(f"tuned {hunt.group.label()}", 1)
        return [self.report(track, choice) for track, choice in zip(hunt.tracks.values(), choices, strict=True)]

    def settled_race(self, track: Track, config: LaunchConfig, again: str) -> dict[LaunchConfig, timing.Timed]:
        """The last race; where its ratio is far from that of the search, the less favourable of two.

        Once in some hundred times a candidate that is prepared for timing is much slower, in all samples, than when it is
        prepared again.
        """
        found = self.last_race(track, config, again)
        expected = [track.candidates[one].median_us if one in track.candidates else None for one in (config, track.default)]
        ratio, known = _ratio(found, config, track.default), [us for us in expected if us]
        if ratio is None or len(known) < 2 or abs(math.log(ratio * known[1] / known[0])) < math.log(SURPRISE):
            return found
        other = self.last_race(track, config, f"{again} anew")
        ratios = [(_ratio(one, config, track.default), one) for one in (found, other)]
        return max(((ratio, one) for ratio, one in ratios if ratio is not None), key=lambda pair: pair[0])[1]

    def last_race(self, track: Track, config: LaunchConfig, again: str) -> dict[LaunchConfig, timing.Timed]:
        configs = list(dict.fromkeys([track.default, config]))
        wanted = [one.to_json() for one in configs]
        known = self.journal.get("final", track.name + again)
        if known is None or known["configs"] != wanted:
            self.timer.open(track.name, track.key)
            seconds = None if self.plan.ask_seconds is None else 2 * self.plan.ask_seconds
            samples, failures = self.timer.sample(track.name, configs, self.plan.final_rounds, seconds)
            methods = [self.timer.methods.get((track.name, one), "") for one in configs]
            self.timer.close(track.name)
            known = {"configs": wanted, "samples": [samples.get(one) for one in configs], "methods": methods}
            known["failures"] = [failures.get(one) for one in configs]
            self.journal.put("final", track.name + again, known)
        found = {}
        for one, samples, method, failure in zip(configs, known["samples"], known["methods"], known["failures"], strict=True):
            if samples is None:
                track.untimed(one, *failure)
            else:
                track.launches += len(samples)
                found[one] = timing.Timed(samples, method)
                candidate = self.candidate(track, one)
                if candidate.median_us is None:
                    candidate.median_us = found[one].median_us
        return found

    @staticmethod
    def beats(timed: dict[LaunchConfig, timing.Timed], config: LaunchConfig, default: LaunchConfig) -> bool:
        if config == default or config not in timed or default not in timed:
            return False
        return strategies.beats(timed[config].samples, timed[default].samples)

    # what is told

    def report(self, track: Track, choice: _Choice | None) -> Json:
        entry = choice.entry(track.key) if choice else None
        gain = choice.default.median_us / choice.timed.median_us if choice else None
        state = "left out" if choice is None else "default" if choice.config == track.default else "tuned"
        self.show(track, state, (choice.timed.median_us if choice else None, gain))
        return {
            "key": track.key._asdict(),
            "config": entry["config"] if entry else None,
            "timing": entry["timing"] if entry else None,
            "gain": None if gain is None else round(gain, 4),
            "launches": track.launches,
            "candidates": [candidate.to_json() for candidate in track.candidates.values()],
            "entry": entry,
        }

    def requests(self) -> dict[str, Json]:
        """What the processes of this one have done: of each kind of request how many, their seconds, and the longest."""
        total = Account()
        for account in {id(one): one for one in (*self.pool.accounts, self.timer.account)}.values():
            total.merge(account.kinds)
        return total.kinds

    def result(self, seconds: float) -> Json:
        keys = []
        for group in self.groups:
            for result in self.results.get(group.label(), []):
                keys.append({name: value for name, value in result.items() if name != "entry"})
        dropped: Counter[str] = Counter()
        for key in keys:
            for candidate in key["candidates"]:
                if candidate["status"] != "timed":
                    dropped[candidate["status"]] += 1
        outdated = Counter(
            cause
            for group in filter(self.chosen_before, self.groups)
            for direction in DIRECTIONS
            for cause in self.known[group.key(direction)].since
        )
        left_out = len(self.groups) - len(self.results)
        if left_out:
            dropped["keys left out: out of time"] = 2 * left_out
        gains = [key["gain"] for key in keys if key["gain"]]
        return {
            "schema": 1,
            "command": "autotune",
            "device": self.description,
            "versions": self.versions,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "seconds_before": round(self.journal.spent_before, 1),
            "effort": self.effort,
            "file": self.path.name,
            "groups": len(self.groups),
            "workers": self.workers,
            "gpus": self.crew.world_size if self.crew else int(self.device.type == "cuda"),
            "resumed": self.resumed,
            "reverified": sum(map(self.chosen_before, self.groups)),
            "outdated": dict(sorted(outdated.items())),
            "kept": len(self.kept),
            "phases": {name: round(spent, 1) for name, spent in self.phases.items()},
            "requests": self.requests(),
            "launches": sum(key["launches"] for key in keys),
            "keys": keys,
            "dropped": dict(dropped),
            "geometric_mean_gain": round(statistics.geometric_mean(gains), 4) if gains else None,
        }


class _Pair(NamedTuple):
    """What may be shipped of a group.

    Attributes:
        one, two: the configurations of both directions.
        found: what became of their proof; None where they are the defaults.
        default: what became of the proof of the defaults; None where it was not needed yet.
    """

    one: LaunchConfig
    two: LaunchConfig
    found: Proved | None
    default: Proved | None

    def configs(self) -> dict[str, LaunchConfig]:
        return dict(zip(DIRECTIONS, (self.one, self.two), strict=True))


class _Raced(NamedTuple):
    """What the last race of a group came to: of each direction the times, and whether what was chosen surely beats the default."""

    timed: dict[str, dict[LaunchConfig, timing.Timed]]
    taken: dict[str, bool]


@dataclass
class _Choice:
    """What the last race decided for one direction."""

    config: LaunchConfig
    proof: Json
    timed: timing.Timed
    default: timing.Timed

    def entry(self, key: Key) -> Json:
        measured = self.timed.to_json()
        figures = {
            "median_us": measured["median_us"],
            "ci_us": measured["ci_us"],
            "default_us": round(self.default.median_us, 4),
            "samples": measured["samples"],
            "method": measured["method"],
        }
        return store.make_entry(key, self.config, figures, self.proof)


def _tagged(direction: str, search: strategies.Search) -> Generator[tuple[str, Ask], Answer, Found]:
    """A search whose asks say which direction they are about."""
    try:
        ask = next(search)
        while True:
            ask = search.send((yield direction, ask))
    except StopIteration as stop:
        found: Found = stop.value
        return found


def _ratio(timed: dict[LaunchConfig, timing.Timed], config: LaunchConfig, default: LaunchConfig) -> float | None:
    """The time of a candidate over the default's; None where one of them could not be timed."""
    if config not in timed or default not in timed:
        return None
    return timed[config].median_us / timed[default].median_us


def _sums(
    timed: dict[str, dict[LaunchConfig, timing.Timed]], tracks: dict[str, Track], pair: _Pair
) -> tuple[list[float], list[float]]:
    """The times of both directions together, sample by sample: of a pair, and of the defaults. Empty where one is not there."""
    sums: list[list[float]] = []
    for configs in ((pair.one, pair.two), (tracks["forward"].default, tracks["backward"].default)):
        one, two = (timed[direction].get(config) for direction, config in zip(DIRECTIONS, configs, strict=True))
        if one is None or two is None:
            return [], []
        sums.append([a + b for a, b in zip(one.samples, two.samples, strict=False)])
    return sums[0], sums[1]


def _holds(at_key: Sequence[Sequence[float]], between: Sequence[Sequence[float]]) -> bool:
    """Whether ours does not surely lose more between the keys than it gains at its key; each (ours, the default's), paired."""
    (ours, theirs), (own, default) = at_key, between
    if not own or not default:
        return False
    gain = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return not strategies.beats(default, [gain * us for us in own])


def _few(track: Track) -> list[LaunchConfig]:
    """The best candidates, and at last the default: what fails in one direction costs the other nothing."""
    few = track.ranked[: 1 + ALTERNATIVES]
    return list(dict.fromkeys([*few, *(space.with_segments(track.default, config.checkpoint_segments) for config in few[:1])]))


def _without(track: Track, configs: list[LaunchConfig], proved: Proved) -> list[LaunchConfig]:
    """The candidates that are left when the first one's proof has failed."""
    if configs[0] != track.default:
        track.drop(configs[0], proved.status, proved.reason)
    return configs[1:]
