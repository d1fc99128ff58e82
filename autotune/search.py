"""The search: for every key, candidates → compile → verify → time → the entry that is written.

Per group (one operator, dtype and bucket, both directions):

1. every candidate is compiled, asked for spills and verified (``proof.py``), on a GPU in worker processes and ahead of
   all timing, so that nothing else runs while times are taken;
2. those that are right are screened by a few interleaved samples;
3. the best few and the default meet in a final round on fresh samples. The fastest is taken if the paired 95 % interval
   of its time over the default's lies below 1; otherwise the default stays. What is reported is from this round;
4. ``coordinate_descent``: another number of checkpoint segments is taken only if both directions together gain by it.

Finished groups are in the output file and in a state file beside it, so that an interrupted run goes on where it was.
Where the output file has a choice for both directions of a group whose proofs do not hold any more, for the kernel has changed,
only that and the default are verified and timed; ``fresh`` looks at all candidates again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from . import device as devices
from . import space, store, timing
from .fingerprint import kernel_sha256
from .proof import Outcome, one_line, prove, raw, run_backward, run_forward
from .space import Group
from .worker import Pool, Task

Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

CPU_SECONDS = {"quick": 140.0, "full": 900.0}
"""What a search on a CPU may take in all. Keys that do not fit into it are left to the heuristic and counted."""

COMPILE_SECONDS = 25.0
"""What a compiled CPU candidate is reckoned to cost before one was seen."""

FINALISTS = 3
SEGMENT_GAIN = 0.99
"""Another number of checkpoint segments must bring forward and backward together below this share."""

STATE_SCHEMA = 1


@dataclass
class Plan:
    """How much is measured."""

    screen_samples: int
    final_samples: int
    sample_us: float
    screen_seconds: float
    final_seconds: float


_PLANS = {
    ("triton", "quick"): Plan(7, 25, 250.0, 1.5, 2.0),
    ("triton", "full"): Plan(9, 41, 400.0, 6.0, 6.0),
    ("cpu", "quick"): Plan(5, 15, 1500.0, 2.0, 3.0),
    ("cpu", "full"): Plan(7, 25, 3000.0, 6.0, 8.0),
}


class OutOfTime(Exception):
    """The time that a search may take is used up."""


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What an interrupted run leaves behind: finished groups and proved candidates.

    It counts only for the same device, kernels, versions and effort (``fingerprint``).
    """

    path: Path
    fingerprint: str
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _written: float = 0.0

    @classmethod
    def open(cls, path: Path, fingerprint: str, fresh: bool) -> State:
        state = cls(path, fingerprint)
        if fresh:
            state.remove()
            return state
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] == STATE_SCHEMA and data["fingerprint"] == fingerprint:
                state.groups, state.outcomes = dict(data["groups"]), dict(data["outcomes"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{path} is not readable as the state of a search; the search begins anew", stacklevel=3)
        return state

    def write(self, every: float = 0.0) -> None:
        """Writes the state, unless it was written less than ``every`` seconds ago."""
        if time.monotonic() - self._written < every:
            return
        data = {
            "schema": STATE_SCHEMA,
            "fingerprint": self.fingerprint,
            "groups": self.groups,
            "outcomes": self.outcomes,
        }
        store.write_atomically(self.path, json.dumps(data))
        self._written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def state_path(output: Path) -> Path:
    """The state file of an output file: hidden, beside it."""
    return output.with_name(f".{output.stem}.search.json")


def _fingerprint(device: dict[str, Any], versions: dict[str, Any], backend: str, effort: str) -> str:
    kernels = {op: kernel_sha256(op, backend) for op in kernel_config.OPS}
    text = json.dumps([device, versions, kernels, effort], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- the run ---------------------------------------------------------------------------------------------------------


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
) -> dict[str, Any]:
    """Tunes a device and writes its configuration file, group by group.

    Args:
        device: what to tune; None is the GPU where there is one, else the CPU.
        effort: ``"quick"`` (few keys and candidates: minutes) or ``"full"``.
        output: the file; None is where lookups find it (:func:`coordroute.autotune.store.output_path`).
        fresh: begin anew instead of going on with an interrupted run.
        progress: called with (total, done, text, seconds left or None).
        groups: tune only these; None is all of the effort.
        seconds: a limit for the whole run; None is :data:`CPU_SECONDS` on a CPU and none on a GPU.
        workers: processes that compile and verify; None is all cores but two, at most 12, on a GPU and 0 on a CPU.
            0 does it in this process.
        seed: of all inputs.

    Returns:
        The evidence as it goes into autotune.json.

    Raises:
        ValueError: an argument or an environment variable is not one that is allowed.
        KeyboardInterrupt: passed on after the finished groups and proofs were kept.
    """
    if effort not in space.EFFORTS:
        raise ValueError(f"effort is {effort!r}; allowed is {' or '.join(space.EFFORTS)}")
    begin = time.monotonic()
    device = devices.as_device(device)
    path = Path(output) if output is not None else store.output_path(device)
    if path.is_dir():
        raise ValueError(f"output is {str(path)!r}, which is a folder; the path of a .json file is needed")
    search = _Search(device, effort, path, fresh, progress, groups, seconds, workers, seed)
    search.run()
    store.reload()
    return search.result(time.monotonic() - begin)


class _Search:
    def __init__(
        self,
        device: torch.device,
        effort: str,
        path: Path,
        fresh: bool,
        progress: Progress | None,
        groups: list[Group] | None,
        seconds: float | None,
        workers: int | None,
        seed: int,
    ) -> None:
        self.device, self.effort, self.path, self.seed = device, effort, path, seed
        self.backend = devices.backend(device)
        self.plan = _PLANS[self.backend, effort]
        self.description, self.versions = devices.describe(device), devices.versions()
        self.groups = space.groups(self.backend, effort) if groups is None else groups
        fingerprint = _fingerprint(self.description, self.versions, self.backend, effort)
        self.state = State.open(state_path(path), fingerprint, fresh)
        self.known = {} if fresh else store.outdated(path, self.backend)
        self.progress = progress
        self.began = time.monotonic()
        if seconds is None and self.backend == "cpu":
            seconds = CPU_SECONDS[effort]
        self.seconds = seconds
        self.deadline = math.inf if seconds is None else self.began + seconds
        if workers is None:
            workers = min(12, max(1, (os.cpu_count() or 2) - 2)) if self.backend == "triton" else 0
        self.workers = workers
        self.pool: Pool | None = None
        self.compile_seconds = COMPILE_SECONDS
        self.out_of_time: list[Group] = []
        self.todo = [group for group in self.groups if group.label() not in self.state.groups]
        self.total = self.done = 0
        self.resumed = len(self.groups) - len(self.todo)

    # progress

    def say(self, text: str, step: int = 0) -> None:
        self.done += step
        if self.progress is None:
            return
        spent = time.monotonic() - self.began
        left = spent / self.done * (self.total - self.done) if self.done >= 3 else None
        if left is not None and self.deadline < math.inf:
            left = min(left, max(0.0, self.deadline - time.monotonic()))
        self.progress(self.total, min(self.done, self.total), text, left)

    # run

    def run(self) -> None:
        tasks = [task for group in self.todo for task in self.tasks(group)]
        self.total = len(tasks) + 3 * len(self.todo)
        try:
            with contextlib.ExitStack() as stack:
                if self.workers:
                    self.pool = stack.enter_context(Pool(str(self.device), self.workers))
                    self.prove_ahead(tasks)
                for position, group in enumerate(self.todo):
                    if time.monotonic() > self.deadline:
                        self.out_of_time += self.todo[position:]
                        break
                    self.one(group, len(self.todo) - position)
        except BaseException:
            self.state.write()
            raise
        self.state.remove()

    def chosen_before(self, group: Group) -> bool:
        return all(group.key(direction) in self.known for direction in kernel_config.DIRECTIONS)

    def candidates(self, group: Group, direction: str) -> list[LaunchConfig]:
        """The candidates of one direction, the default first: all, or the default and what was chosen before."""
        key = group.key(direction)
        found = space.candidates(key, self.backend, self.effort)
        return list(dict.fromkeys([found[0], self.known[key]])) if self.chosen_before(group) else found

    def tasks(self, group: Group) -> list[Task]:
        """The candidates of a group with the default segments, each joined to the other direction's default."""
        made = []
        for direction, other in (("forward", "backward"), ("backward", "forward")):
            partner = kernel_config.heuristic(group.key(other), self.backend)
            key = group.key(direction)
            for one in self.candidates(group, direction):
                made.append(Task(key, one, space.with_segments(partner, one.checkpoint_segments), self.seed))
        return made

    def prove_ahead(self, tasks: list[Task]) -> None:
        pool = self.pool
        missing = [task for task in tasks if task.identifier() not in self.state.outcomes]
        self.done += len(tasks) - len(missing)
        self.say(f"compiling and verifying {len(missing)} candidates in {self.workers} processes")
        if pool is None:
            return
        for task, outcome in pool.prove_all(missing):
            self.state.outcomes[task.identifier()] = asdict(outcome)
            self.state.write(every=2.0)
            self.say(f"verified {_label(task.key)}", 1)
        self.state.write()

    def prove(self, task: Task, *, counts: bool = True) -> Outcome:
        """The outcome of a candidate: remembered, by a worker, or here."""
        identifier = task.identifier()
        known = self.state.outcomes.get(identifier)
        if known is not None:
            if counts and not self.workers:
                self.say(f"verified {_label(task.key)}", 1)
            return Outcome(**known)
        if self.pool is not None:
            outcome = next((found for _, found in self.pool.prove_all([task])), Outcome("crashes", "no worker answered"))
        else:
            outcome = prove(self.device, task.key, task.config, task.partner, task.seed)
        self.state.outcomes[identifier] = asdict(outcome)
        self.state.write(every=2.0)
        if counts and not self.workers:
            self.say(f"verified {_label(task.key)}", 1)
        return outcome

    def one(self, group: Group, left: int) -> None:
        limit = math.inf
        if self.deadline < math.inf:
            limit = time.monotonic() + (self.deadline - time.monotonic()) / left * 1.5
        try:
            results = _Tuner(self, group, min(limit, self.deadline)).tune()
        except OutOfTime:
            self.out_of_time.append(group)
            return
        entries = [entry for result in results if (entry := result.pop("entry")) is not None]
        if entries:
            store.save(self.path, self.description, self.versions, entries)
        self.state.groups[group.label()] = {"keys": results}
        self.state.write()
        self.say(f"tuned {group.label()}", 1)

    # result

    def result(self, seconds: float) -> dict[str, Any]:
        order = {group.label(): position for position, group in enumerate(self.groups)}
        labels = sorted((label for label in self.state.groups if label in order), key=lambda label: order[label])
        keys = [key for label in labels for key in self.state.groups[label]["keys"]]
        dropped: Counter[str] = Counter()
        for key in keys:
            for candidate in key["candidates"]:
                if candidate["status"] not in ("timed", "slower"):
                    dropped[candidate["status"]] += 1
        if self.out_of_time:
            dropped["keys left out: out of time"] = 2 * len(self.out_of_time)
        gains = [key["gain"] for key in keys if key["gain"]]
        return {
            "schema": 1,
            "command": "autotune",
            "device": self.description,
            "versions": self.versions,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "effort": self.effort,
            "file": self.path.name,
            "resumed": 2 * self.resumed,
            "keys": keys,
            "dropped": dict(dropped),
            "geometric_mean_gain": round(statistics.geometric_mean(gains), 4) if gains else None,
        }


def _label(key: Key) -> str:
    return f"{key.op} {key.direction} {key.dtype} {key.rows}x{key.n}"


# --- one group -------------------------------------------------------------------------------------------------------


@dataclass
class _Candidate:
    config: LaunchConfig
    outcome: Outcome
    status: str
    median_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "status": self.status,
            "reason": self.outcome.reason,
            "median_us": None if self.median_us is None else round(self.median_us, 4),
            "registers": self.outcome.registers,
            "spills": self.outcome.spills,
        }


@dataclass
class _Choice:
    """What a final round decided for one direction."""

    config: LaunchConfig
    outcome: Outcome
    timed: timing.Timed
    default: timing.Timed

    def entry(self, key: Key) -> dict[str, Any]:
        measured = self.timed.to_json()
        figures = {
            "median_us": measured["median_us"],
            "ci_us": measured["ci_us"],
            "default_us": round(self.default.median_us, 4),
            "samples": measured["samples"],
            "method": measured["method"],
        }
        return store.make_entry(key, self.config, figures, self.outcome.proof or {})


class _Tuner:
    """Tunes one group: both directions of one operator on one bucket."""

    def __init__(self, search: _Search, group: Group, deadline: float) -> None:
        self.search, self.group, self.deadline = search, group, deadline
        self.device, self.plan = search.device, search.plan
        self.kernels = raw(group.op, search.backend)
        self.defaults = {
            direction: kernel_config.heuristic(group.key(direction), search.backend) for direction in kernel_config.DIRECTIONS
        }
        self.candidates: dict[str, list[_Candidate]] = {}

    def tune(self) -> list[dict[str, Any]]:
        choices: dict[str, _Choice | None] = {}
        finalists: dict[str, list[_Candidate]] = {}
        for direction in kernel_config.DIRECTIONS:
            self.search.say(f"timing {_label(self.group.key(direction))}")
            self.candidates[direction] = self.proved(direction)
            finalists[direction] = self.screened(direction)
            choices[direction] = self.final(direction, finalists[direction])
            self.search.say(f"timed {_label(self.group.key(direction))}", 1)
        self.with_other_segments(choices)
        return [self.report(direction, choices[direction]) for direction in kernel_config.DIRECTIONS]

    def report(self, direction: str, choice: _Choice | None) -> dict[str, Any]:
        key = self.group.key(direction)
        entry = choice.entry(key) if choice else None
        return {
            "key": key._asdict(),
            "config": entry["config"] if entry else None,
            "timing": entry["timing"] if entry else None,
            "gain": round(choice.default.median_us / choice.timed.median_us, 4) if choice else None,
            "candidates": [candidate.to_json() for candidate in self.candidates[direction]],
            "entry": entry,
        }

    def task(self, direction: str, config: LaunchConfig) -> Task:
        """A candidate joined to the other direction's default, with the segments of the candidate."""
        other = "backward" if direction == "forward" else "forward"
        partner = space.with_segments(self.defaults[other], config.checkpoint_segments)
        return Task(self.group.key(direction), config, partner, self.search.seed)

    def proved(self, direction: str) -> list[_Candidate]:
        found = []
        for config in self.search.candidates(self.group, direction):
            compiled = config.variant == "inductor"
            left = self.deadline - time.monotonic()
            if left < (self.search.compile_seconds if compiled else 0.0):
                if config == self.defaults[direction]:
                    raise OutOfTime
                outcome = Outcome("out of time", "no time was left to verify it")
                self.search.say("", 1)
            else:
                outcome = self.search.prove(self.task(direction, config))
                if compiled and outcome.seconds > 1.0:
                    self.search.compile_seconds = outcome.seconds
            status = "timed" if outcome.status == "ok" else outcome.status
            found.append(_Candidate(config, outcome, status))
        return found

    # the inputs

    def bytes_per_set(self) -> int:
        """What a forward reads and writes; a backward moves more."""
        return 2 * self.group.rows * self.group.n * getattr(torch, self.group.dtype).itemsize

    def scores(self) -> torch.Tensor:
        """[sets, rows, n], normal."""
        return self._normal(0)

    def grads(self) -> torch.Tensor:
        return self._normal(1)

    def _normal(self, offset: int) -> torch.Tensor:
        shape = (timing.input_sets(self.device, self.bytes_per_set()), self.group.rows, self.group.n)
        generator = torch.Generator(self.device).manual_seed(2 * self.search.seed + offset)
        made = torch.empty(shape, dtype=getattr(torch, self.group.dtype), device=self.device)
        for one in made:
            one.copy_(torch.randn(shape[1:], generator=generator, device=self.device))
        return made

    def works(self, direction: str, configs: list[LaunchConfig]) -> list[timing.Work]:
        scores, op, kernels, size = self.scores(), self.group.op, self.kernels, self.bytes_per_set()
        made: list[timing.Work] = []
        if direction == "forward":
            for config in configs:
                made.append(timing.Work("", _forward_call(op, kernels, scores, config), len(scores), size))
            return made
        grads = self.grads()
        saved: dict[int | None, list[torch.Tensor]] = {}
        for config in configs:
            segments = config.checkpoint_segments
            if segments not in saved:
                forward = space.with_segments(self.defaults["forward"], segments)
                saved[segments] = [run_forward(op, kernels, one, forward)[1] for one in scores]
            call = _backward_call(op, kernels, grads, scores, saved[segments], config)
            made.append(timing.Work("", call, len(scores), size))
        return made

    def race(self, direction: str, configs: list[LaunchConfig], final: bool) -> list[timing.Timed | Exception]:
        plan = self.plan
        samples, seconds = (plan.final_samples, plan.final_seconds) if final else (plan.screen_samples, plan.screen_seconds)
        seconds = max(0.05, min(seconds, self.deadline - time.monotonic()))
        with _no_grad(self.device):
            works = self.works(direction, configs)
            return timing.race(works, self.device, samples=samples, target_us=plan.sample_us, seconds=seconds)

    # the rounds

    def screened(self, direction: str) -> list[_Candidate]:
        """The best few of those that are right, the default first. Empty when the default itself is not right."""
        right = [candidate for candidate in self.candidates[direction] if candidate.status == "timed"]
        default = next((one for one in right if one.config == self.defaults[direction]), None)
        if default is None:
            return []
        timed = self.race(direction, [one.config for one in right], final=False)
        for candidate, result in zip(right, timed, strict=True):
            if isinstance(result, timing.Timed):
                candidate.median_us = result.median_us
            else:
                candidate.status = "crashes"
                candidate.outcome = replace(candidate.outcome, reason=one_line(result))
        others = [one for one in right if one is not default and one.median_us is not None]
        others.sort(key=lambda one: one.median_us or math.inf)
        for slower in others[FINALISTS:]:
            slower.status = "slower"
        return [default, *others[:FINALISTS]]

    def final(self, direction: str, finalists: list[_Candidate]) -> _Choice | None:
        """A race of the best few and the default on fresh samples; the default stays unless another surely beats it."""
        if not finalists:
            return None
        results = self.race(direction, [one.config for one in finalists], final=True)
        default = results[0]
        if not isinstance(default, timing.Timed):
            return None
        chosen, best = finalists[0], default
        for candidate, result in zip(finalists[1:], results[1:], strict=True):
            if not isinstance(result, timing.Timed):
                continue
            candidate.median_us = result.median_us
            if result.median_us < best.median_us and timing.paired_ratio(result, default)[2] < 1.0:
                chosen, best = candidate, result
        finalists[0].median_us = default.median_us
        return _Choice(chosen.config, chosen.outcome, best, default)

    def with_other_segments(self, choices: dict[str, _Choice | None]) -> None:
        """Takes another number of checkpoint segments where forward and backward together gain by it."""
        others = () if self.search.chosen_before(self.group) else space.segment_choices(self.group.op, self.search.effort)[1:]
        forward, backward = choices["forward"], choices["backward"]
        if not others or forward is None or backward is None or time.monotonic() > self.deadline:
            return
        base = (None, *others)

        def raced(direction: str, choice: _Choice, final: bool, counts: tuple[int | None, ...]) -> list[Any]:
            configs = [space.with_segments(choice.config, one or choice.config.checkpoint_segments) for one in counts]
            return self.race(direction, configs, final)

        def sums(counts: tuple[int | None, ...], final: bool) -> tuple[list[Any], list[Any], list[float]]:
            one, two = raced("forward", forward, final, counts), raced("backward", backward, final, counts)
            added = [
                a.median_us + b.median_us if isinstance(a, timing.Timed) and isinstance(b, timing.Timed) else math.inf
                for a, b in zip(one, two, strict=True)
            ]
            return one, two, added

        _, _, screened = sums(base, final=False)
        best = min(range(len(base)), key=lambda i: (screened[i], i))
        segments = base[best]
        if segments is None or screened[best] > SEGMENT_GAIN * screened[0]:
            return
        proved = {}
        for direction, choice in (("forward", forward), ("backward", backward)):
            config = space.with_segments(choice.config, segments)
            outcome = self.search.prove(self.task(direction, config), counts=False)
            if outcome.status != "ok":
                self.candidates[direction].append(_Candidate(config, outcome, outcome.status))
                return
            proved[direction] = (config, outcome)
        one, two, added = sums((None, segments), final=True)
        if not added[1] <= SEGMENT_GAIN * added[0]:
            return
        for direction, results in (("forward", one), ("backward", two)):
            config, outcome = proved[direction]
            old = choices[direction]
            if old is None:
                return
            # the default was not in this race: it is put on its scale by the configuration that was in both
            scale = results[0].median_us / old.timed.median_us
            default = timing.Timed([sample * scale for sample in old.default.samples], old.default.method)
            choices[direction] = _Choice(config, outcome, results[1], default)
            self.candidates[direction].append(_Candidate(config, outcome, "timed", results[1].median_us))


@contextlib.contextmanager
def _no_grad(device: torch.device) -> Iterator[None]:
    with torch.no_grad():
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


def _forward_call(op: str, kernels: Any, scores: torch.Tensor, config: LaunchConfig) -> Callable[[int], Any]:
    return lambda i: run_forward(op, kernels, scores[i], config)


def _backward_call(
    op: str, kernels: Any, grads: torch.Tensor, scores: torch.Tensor, saved: list[torch.Tensor], config: LaunchConfig
) -> Callable[[int], Any]:
    return lambda i: run_backward(op, kernels, grads[i], scores[i], saved[i], config)
