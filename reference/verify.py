"""The verification suite: any implementation of a differentiable top-k against float64, on whatever device it runs.

    from coordroute.reference import verify
    report = verify.run({"soft_topk": my_soft_topk}, device="cuda", examples=1000, seed=0)

How an implementation is called, and what is measured, is in :mod:`properties`; what it is called on is in :mod:`cases`.
:func:`run` goes through the facets (kinds of input that differ from plain ones in one thing), then through rows that hypothesis
draws from all of them at once, and says which property fails on which facet. A counterexample is shrunk to few and short rows.

The work is cut into parts, one operator, dtype and facet each, that run side by side in processes. One that crashes its process, or
hangs, or leaves the GPU in an error, fails its own part and no other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from . import cases, compare, families
from .cases import DTYPES, FACETS, KINDS, Case, draw, proof_cases
from .oracles import Array
from .properties import (
    ALWAYS,
    EVERY,
    EXECUTION,
    PROOF,
    PROPERTIES,
    Finding,
    Target,
    accepts,
    examine,
    execution_case,
    judge,
)

__all__ = ["DTYPES", "KINDS", "PROPERTIES", "Case", "Finding", "check", "check_candidate", "draw", "examine", "proof_cases", "run"]

Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

SHRINK_SECONDS, SHRINK_SECONDS_IN_ALL = 8.0, 40.0
"""How long one counterexample, and all of a run, are shrunk."""
HANG_SECONDS = 120.0
"""A process that has not said anything for so long is taken to hang: a batch takes seconds, with compilation."""
SHARD_ROWS = 4000
"""Rows of one part; more are cut up, so that processes share them."""
EXECUTION_FACET, VARIANTS_FACET = "execution", "variants"
"""Two facets that are no kind of input: how it runs, and launches other than the one that serves a call."""
SENTENCES = {
    **{name: facet.sentence for name, facet in FACETS.items() if name != "everything"},
    EXECUTION_FACET: "streams, graphs, replays and registration, on one batch",
    VARIANTS_FACET: "every launch configuration in the search space of a few lengths, on the cases of a proof",
    "everything": FACETS["everything"].sentence,
}
"""What is run, in this order: what says most about a failure comes first."""
VARIANT_SHARES = 6
"""Parts that share the other launches."""


# --- one case --------------------------------------------------------------------------------------------------------


def check(target: Target, case: Case, device: torch.device | str = "cpu", only: tuple[str, ...] | None = None) -> None:
    """For a test: raises where an implementation does not hold to every property on a case.

    Args:
        target: called as :mod:`properties` says.
        case: such as :func:`cases.strategy` draws.
        device: where it runs.
        only: names of the properties to check; None is all that the case comes to.

    Raises:
        AssertionError: names the property, the row, the error and its bound, and the case as code.
    """
    for finding in examine(target, case, device, only=only):
        if not finding.holds:
            raise AssertionError(f"{finding.to_text()} ({PROPERTIES[finding.name].sentence}); on {case!r}")


def check_candidate(
    target: Target, op: str, *, device: torch.device | str, dtype: torch.dtype, n: int, seed: int = 0, most: int | None = None
) -> dict[str, Any]:
    """Proves one launch configuration: values and gradients of the cases of :func:`cases.proof_cases`.

    Args:
        target: the operator launched with that configuration.
        op: "soft_topk" or "coordinate_descent".
        device: where it runs.
        dtype: of the scores.
        n: the length of rows that the configuration is for.
        seed: of the inputs.
        most: rows of a batch, at most; None is any.

    Returns:
        ``{"ok", "reason", "cases" (rows compared), "families", "max_error": {"value", "grad_scores", "grad_k"},
        "bound": likewise, at the same row, "replays_bitwise", "seed"}``.
    """
    names = {"values": "value", "grad scores": "grad_scores", "grad k": "grad_k"}
    worst: dict[str, tuple[float, float, float]] = {}
    compared = 0
    used: set[str] = set()
    failure = ""
    replays = True
    for case in proof_cases(op, str(dtype).removeprefix("torch."), n, seed, most):
        compared += len(case.rows)
        used |= {family for family, _ in case.rows}
        for finding in examine(target, case, device, longest=n, only=PROOF):
            if not finding.holds and not failure:
                failure = f"{finding.to_text()} (n = {case.n}, family {case.rows[finding.worst][0]})"
            replays = replays and not (finding.name == "replays bitwise" and not finding.holds)
            if finding.name in names:
                at, ratio = finding.worst, float(finding.ratio[finding.worst])
                if ratio >= worst.get(finding.name, (-1.0, 0.0, 0.0))[0]:
                    worst[finding.name] = (ratio, float(finding.error[at]), float(finding.bound[at]))
    return {
        "ok": not failure,
        "reason": failure,
        "cases": compared,
        "families": sorted(used),
        "max_error": {short: worst[name][1] if name in worst else None for name, short in names.items()},
        "bound": {short: worst[name][2] if name in worst else None for name, short in names.items()},
        "replays_bitwise": replays,
        "seed": seed,
    }


# --- what was seen ---------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What was seen of one property."""

    rows: int = 0
    left_out: int = 0
    ratio: float = -1.0
    error: float | None = None
    bound: float | None = None
    family: str | None = None

    def add(self, finding: Finding, case: Case) -> None:
        out = int(finding.left_out.sum())
        at = finding.worst
        one = _Tally(len(case.rows) - out, out)
        if not finding.left_out[at]:
            one.ratio, one.error, one.bound = float(finding.ratio[at]), float(finding.error[at]), float(finding.bound[at])
            one.family = case.rows[at][0]
        self.merge(one)

    def merge(self, other: _Tally) -> None:
        self.rows += other.rows
        self.left_out += other.left_out
        if other.ratio > self.ratio:
            self.ratio, self.error, self.bound, self.family = other.ratio, other.error, other.bound, other.family

    @property
    def share(self) -> float:
        return self.left_out / max(self.left_out + self.rows, 1)


@dataclass
class _Failure:
    """A counterexample.

    Attributes:
        case: what it was called on.
        finding: what failed.
        lost: whether it ended its process, or hung, or broke the GPU's context: not to be done again to make it smaller.
    """

    case: Case
    finding: Finding
    lost: bool = False

    def size(self) -> tuple[int, int]:
        return len(self.case.rows), self.case.n


class _Part(NamedTuple):
    """One operator, dtype and facet of a run."""

    op: str
    dtype: str
    facet: str
    where: str
    variants: str
    device: str
    rows: int
    seed: int
    longest: int
    share: int = 0


class _Shrink(NamedTuple):
    """A counterexample that is to be made smaller."""

    part: _Part
    failure: _Failure
    seconds: float


@dataclass
class _Outcome:
    """What a part came to."""

    tallies: dict[str, _Tally] = field(default_factory=dict)
    failures: dict[str, _Failure] = field(default_factory=dict)
    errors: dict[str, list[Array]] = field(default_factory=dict)  # quantity -> [2, rows], ulps of it and of plain torch
    rows: int = 0
    batches: int = 0
    reason: str = ""  # why it was not run, or ended early
    seconds: float = 0.0
    ended: float = 0.0  # time.time()

    def add(self, finding: Finding, case: Case) -> None:
        self.tallies.setdefault(finding.name, _Tally()).add(finding, case)
        if finding.ulps is not None and finding.plain_ulps is not None:
            both = np.stack([finding.ulps, finding.plain_ulps])[:, ~finding.left_out]
            self.errors.setdefault(finding.name, []).append(both[:, np.isfinite(both).all(axis=0)])
        if not finding.holds:
            found = _Failure(case, finding)
            if finding.name not in self.failures or found.size() < self.failures[finding.name].size():
                self.failures[finding.name] = found

    def lose(self, message: str, case: Case) -> None:
        """Something ended the part: a failure of "runs", unless that has one."""
        self.reason = message
        if "runs" not in self.failures:
            rows = len(case.rows)
            self.add(Finding("runs", np.full(rows, np.inf), np.zeros(rows), np.zeros(rows, bool), message), case)
        self.failures["runs"].lost = True

    def merge(self, other: _Outcome) -> None:
        for name, tally in other.tallies.items():
            self.tallies.setdefault(name, _Tally()).merge(tally)
        for name, found in other.failures.items():
            # facets come simplest first: the first counterexample says most
            self.failures.setdefault(name, found)
        for name, arrays in other.errors.items():
            self.errors.setdefault(name, []).extend(arrays)
        self.rows += other.rows
        self.batches += other.batches
        self.seconds += other.seconds
        self.ended = max(self.ended, other.ended)


class _Broken(Exception):
    """The GPU is in an error that only a new process ends."""


def _check_context(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise _Broken(f"the GPU was left in an error: {' '.join(str(error).split())[:200]}") from error


# --- running a part --------------------------------------------------------------------------------------------------

Say = Callable[[str, int, Case | None], None]
"""Called with (what is done, rows done since, the case that is run next)."""


def _run_part(part: _Part, target: Target, say: Say) -> _Outcome:
    device, outcome, begin = torch.device(part.device), _Outcome(), time.monotonic()
    text = f"{part.op} {part.dtype}, {part.facet}"
    last = Case(part.op, part.dtype)

    def tell(text: str, rows: int, case: Case | None) -> None:
        nonlocal last
        last = case or last
        say(text, rows, case)

    tell(text, 0, None)
    try:
        if part.facet == VARIANTS_FACET:
            _run_variants(part, device, outcome, tell)
        elif part.facet == EXECUTION_FACET:
            case = execution_case(part.op, part.dtype)
            tell(text, 0, case)
            _examine_into(outcome, target, case, device, EXECUTION)
        else:
            _run_facet(part, target, device, outcome, tell)
    except _Broken as error:
        outcome.lose(str(error), last)
    judge.cache_clear()
    outcome.seconds, outcome.ended = time.monotonic() - begin, time.time()
    # what was not told row by row
    told = outcome.rows if part.facet in FACETS else 0
    say(text, max(part.rows - told, 0), None)
    return outcome


def _examine_into(outcome: _Outcome, target: Target, case: Case, device: torch.device, only: tuple[str, ...] | None) -> None:
    for finding in examine(target, case, device, only=only):
        outcome.add(finding, case)
    outcome.rows += len(case.rows)
    outcome.batches += 1
    if any(name in outcome.failures for name in ("runs", "guard bands")):
        _check_context(device)


def _run_facet(part: _Part, target: Target, device: torch.device, outcome: _Outcome, say: Say) -> None:
    text = f"{part.op} {part.dtype}, {part.facet}"
    if part.facet == "segments" and not accepts(target, "checkpoint_segments"):
        outcome.reason = "it takes no checkpoint_segments"
        return
    try:
        drawn = cases.strategy(part.op, part.dtype, part.longest, part.facet, accepts(target, "mask"), full=True)
    except ValueError as error:
        outcome.reason = str(error)
        return

    def note(case: Case) -> None:
        say(text, 0, case)
        # the first batch, and one in so many of the others, for what needs further oracles
        whole = outcome.batches % EVERY == 0 and part.facet != "long rows"
        _examine_into(outcome, target, case, device, None if whole else ALWAYS)
        say(text, len(case.rows), None)

    seed = part.seed
    while outcome.rows < part.rows:
        before = outcome.rows
        _explore(drawn, math.ceil((part.rows - before) / FACETS[part.facet].batch) + 1, seed, False, _but_the_first(note))
        seed += 1 << 32
        if outcome.rows == before:  # hypothesis has nothing new to draw
            break


def _but_the_first(test: Callable[[Case], None]) -> Callable[[Case], None]:
    """Hypothesis begins with the simplest example, which is one row over and over."""
    calls = itertools.count()

    def skipping(case: Case) -> None:
        if next(calls):
            test(case)

    return skipping


def _run_variants(part: _Part, device: torch.device, outcome: _Outcome, say: Say) -> None:
    """Every launch configuration of a few lengths, each held to the truth: so all of them agree."""
    names = ("values", "grad scores", "grad k", "grad eps", "replays bitwise", "guard bands")
    every = _imported(part.variants)(part.op, part.dtype, part.device)
    for name, n, target, most in itertools.islice(every, part.share, None, VARIANT_SHARES):
        text = f"{part.op} {part.dtype}, {name}"
        for case in proof_cases(part.op, part.dtype, n, part.seed, most):
            say(text, 0, case)
            for finding in examine(target, case, device, only=names):
                text_of = f"{name}: {finding.to_text()}" if not finding.holds else ""
                found = replace(finding, name="variants", message=text_of, ulps=None, plain_ulps=None)
                outcome.add(found, case)
            outcome.rows += len(case.rows)
            outcome.batches += 1
        _check_context(device)


def _explore(strategy: Any, examples: int, seed: int, shrink: bool, test: Callable[[Case], None]) -> None:
    """Calls ``test`` on drawn cases; with ``shrink``, on ever smaller ones once it has raised."""
    import hypothesis
    from hypothesis import HealthCheck, Phase

    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(strategy)
    def drawn(case: Case) -> None:
        test(case)

    drawn()


# --- shrinking -------------------------------------------------------------------------------------------------------


class _Violation(Exception):
    """A property fails on a case."""


class _Enough(BaseException):
    """Shrinking has taken long enough; not an Exception, so that hypothesis passes it on."""


def _shrunk(task: _Shrink, target: Target, say: Say) -> _Failure:
    """The smallest counterexample to one property that can be found in the time there is."""
    part, best, device = task.part, task.failure, torch.device(task.part.device)
    name, until = best.finding.name, time.monotonic() + task.seconds
    text = f"shrinking a counterexample to {name!r} of {part.op} {part.dtype}"

    def fails(case: Case) -> bool:
        nonlocal best
        if time.monotonic() > until:
            raise _Enough
        say(text, 0, case)
        finding = next((one for one in examine(target, case, device, only=(name,)) if one.name == name and not one.holds), None)
        if finding is None:
            _check_context(device)
            return False
        found = _Failure(case, finding)
        if found.size() <= best.size():
            best = found
        return True

    def test(case: Case) -> None:
        if fails(case):
            raise _Violation

    import hypothesis

    first = best.case
    try:
        # the worst row alone is nearly always enough, else it and a neighbour; then ever shorter ones of its kind
        rows, at = first.rows, best.finding.worst
        for some in (rows[at : at + 1], rows[max(at - 1, 0) : at + 1], rows[at : at + 2]):
            if fails(replace(first, rows=some)):
                break
        for n in families.lengths(best.case.n)[:-1]:
            if fails(replace(best.case, n=n)):
                break
        plainer: tuple[dict[str, Any], ...] = ({"layout": "contiguous"}, {"grad": "dense"}, {"segments": None})
        for simpler in (*plainer, {"tensor_eps": False}, {"tensor_k": False}):
            fails(replace(best.case, **simpler))
        for family in ("normal", "uniform"):
            if fails(replace(best.case, rows=((family, 0),) * len(best.case.rows))):
                break
        if part.facet in FACETS:
            drawn = cases.strategy(part.op, part.dtype, part.longest, part.facet, accepts(target, "mask"))
            _explore(drawn, 20, part.seed, True, test)
    except (_Violation, _Enough, _Broken, ValueError, hypothesis.errors.HypothesisException):
        pass  # the last of them: what fails once and not again, as where memory is read that nobody wrote
    return best


def _reproducer(name: str, where: str, case: Case, device: str) -> str:
    module, _, attribute = where.partition(":")
    return "\n".join(
        (
            f"from {module} import {attribute}",
            "from coordroute.reference import verify",
            "",
            f"case = verify.{case!r}",
            f"for finding in verify.examine({attribute}, case, {device!r}, only=({name!r},)):",
            f"    if finding.name == {name!r}:",
            "        print(finding.to_text())",
            "print(verify.draw(case))  # the scores, what is valid, k, eps and the gradient of lam",
        )
    )


# --- processes -------------------------------------------------------------------------------------------------------

Task = _Part | _Shrink
Result = _Outcome | _Failure


def _perform(task: Task, target: Target, say: Say) -> Result:
    return _shrunk(task, target, say) if isinstance(task, _Shrink) else _run_part(task, target, say)


def _part_of(task: Task) -> _Part:
    return task.part if isinstance(task, _Shrink) else task


def _imported(where: str) -> Any:
    module, _, attribute = where.partition(":")
    found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    if not callable(found):
        raise TypeError(f"{where} is a {type(found).__name__}, which cannot be called")
    return found


def _serve(pipe: Any) -> None:
    """A process that performs one task after another, until it is killed; it ends where the GPU was left in an error."""
    torch.set_num_threads(1)  # processes share the cores: the oracles must not all use all of them
    while True:
        task = pipe.recv()
        pipe.send(_perform(task, _imported(_part_of(task).where), lambda *what: pipe.send(what)))
        try:
            _check_context(torch.device(_part_of(task).device))
        except _Broken:
            return


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first moment: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Worker:
    process: Any
    pipe: Any
    task: Task | None = None
    case: Case | None = None
    heard: float = 0.0


class _Pool:
    """Performs tasks in this process, or in several; the result of one that dies or hangs says so."""

    def __init__(self, targets: dict[str, Target], workers: int, say: Callable[[str, int], None]) -> None:
        self.targets, self.count, self.say = targets, workers, say
        self.workers: list[_Worker] = []

    def perform(self, tasks: list[Task], stop: Callable[[], bool] = lambda: False) -> list[Result | None]:
        """The results, in the order of the tasks; None for those that were not begun before ``stop`` was true."""
        if self.count <= 1:
            results: list[Result | None] = []
            for task in tasks:
                target = self.targets[_part_of(task).op]
                results.append(_perform(task, target, lambda text, rows, case: self.say(text, rows)))
                if stop():
                    break
            return results + [None] * (len(tasks) - len(results))
        found: dict[int, Result] = {}
        waiting = list(range(len(tasks)))
        assigned: dict[int, int] = {}
        while waiting or assigned:
            if stop():
                waiting.clear()
            while waiting and len(assigned) < self.count:
                worker = self._idle()
                number = waiting.pop(0)
                worker.task, worker.case, worker.heard = tasks[number], None, time.monotonic()
                assigned[id(worker)] = number
                # one that died while it was idle is noticed below, where the end of its pipe is read
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.pipe.send(tasks[number])
            busy = [worker for worker in self.workers if id(worker) in assigned]
            ready = multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                result = self._listen(worker) if worker.pipe in ready else self._watch(worker)
                if result is not None:
                    found[assigned.pop(id(worker))] = result
                    worker.task = None
        return [found.get(number) for number in range(len(tasks))]

    def _idle(self) -> _Worker:
        for worker in self.workers:
            if worker.task is None and worker.process.is_alive():
                return worker
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()
        self.workers.append(_Worker(process, mine))
        return self.workers[-1]

    def _listen(self, worker: _Worker) -> Result | None:
        try:
            message = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            status = worker.process.exitcode
            return self._lost(worker, f"the process that ran it ended with exit status {status} before it was done")
        worker.heard = time.monotonic()
        if isinstance(message, (_Outcome, _Failure)):
            return message
        text, rows, case = message
        worker.case = case or worker.case
        self.say(text, rows)
        return None

    def _watch(self, worker: _Worker) -> Result | None:
        if time.monotonic() - worker.heard < HANG_SECONDS:
            return None
        worker.process.kill()
        worker.process.join()
        return self._lost(worker, f"it hangs: nothing was heard for {HANG_SECONDS:.0f} seconds")

    def _lost(self, worker: _Worker, message: str) -> Result:
        self.workers.remove(worker)
        task = worker.task
        if isinstance(task, _Shrink):
            return task.failure
        part = _part_of(task)  # type: ignore[arg-type]
        outcome = _Outcome(ended=time.time())
        outcome.lose(message, worker.case or Case(part.op, part.dtype))
        return outcome

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()


def default_workers(device: torch.device) -> int:
    """Processes to run on: all cores but two, at most 30, on a GPU; this one on a CPU, whose kernels use all cores."""
    if device.type != "cuda":
        return 1
    # the cores that this process may use, where the system says so
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min(30, max(1, cores - 2))


# --- the suite -------------------------------------------------------------------------------------------------------


def _parts(
    targets: dict[str, Target],
    named: dict[str, str],
    device: torch.device,
    examples: int,
    seed: int,
    dtypes: tuple[str, ...],
    facets: tuple[str, ...],
    longest: int,
    variants: str | None,
) -> list[_Part]:
    found = []
    # the facets of all come first: they say what a failure hangs on
    batches = 3 if examples > FACETS["everything"].batch else 2
    for facet in facets:
        for op in (op for op in KINDS if op in targets):
            if facet in FACETS and op not in FACETS[facet].kinds:
                continue
            if facet == VARIANTS_FACET and (variants is None or op == "relaxed_topk"):
                continue
            for dtype in dtypes:
                if facet == VARIANTS_FACET and dtype != dtypes[0]:
                    continue  # the code is the same in every dtype, and every shipped configuration has its own proof
                if facet == "everything":
                    shards = [min(SHARD_ROWS, examples - done) for done in range(0, examples, SHARD_ROWS)]
                elif facet == VARIANTS_FACET:
                    shards = [16] * VARIANT_SHARES
                elif facet in ("long rows", EXECUTION_FACET):
                    shards = [8]
                else:
                    shards = [FACETS[facet].batch * batches * (2 if facet == "any length" else 1)]
                for number, rows in enumerate(shards):
                    begin = seed + (number << 40) * (facet == "everything")
                    found.append(_Part(op, dtype, facet, named[op], variants or "", str(device), rows, begin, longest, number))
    # every operator and dtype gets its share early
    return sorted(found, key=lambda part: (facets.index(part.facet), part.share))


def run(
    targets: dict[str, Target],
    *,
    device: torch.device | str | None = None,
    examples: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    longest: int | None = None,
    facets: tuple[str, ...] | None = None,
    where: dict[str, str] | None = None,
    variants: str | None = None,
    workers: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Runs the whole suite.

    Args:
        targets: operator (one of ``KINDS``) -> the implementation to be judged.
        device: where; None is the current GPU where there is one, else the CPU.
        examples: rows that hypothesis draws for each operator and dtype from all facets at once, beside a few dozen of each.
        seed: of all draws; the same seed draws the same cases where the same modules are loaded (hypothesis mixes in their
            constants).
        progress: called with (total, done, text, seconds left or None).
        dtypes: of the scores.
        longest: the longest rows drawn; None is any on a GPU (1,000,003 in "long rows", 16,384 elsewhere) and 2,049 on a CPU.
        facets: the names of those to run, of ``SENTENCES``; None is all.
        where: operator -> "module:function", where processes import the implementations from, and the code that reproduces a
            failure. None: they are in this process only, and so is the run; the code then names coordroute's own.
        variants: "module:function" of a function (op, dtype, device) -> iterable of (name, n, implementation, most): other launches
            of the same operator, which are held to the same truth, on batches of at most so many rows or of any (None). None: there
            are none.
        workers: processes, each running one part at a time; None is :func:`default_workers`, 1 is this one.
        seconds: begin no further part after so long, and say which facets were cut short.

    Returns:
        ``{"seed", "examples", "seconds", "ok", "properties": [...], "facets": [...], "distributions": [...], "failures": [...]}``.
        A row of properties is ``{"op", "property", "sentence", "derivation", "dtype", "cases", "left_out", "worst_error", "bound",
        "worst_ratio", "worst_family", "failing_facets", "verdict", "reason"}``; of facets ``{"op", "dtype", "facet", "sentence",
        "rows", "failed", "verdict", "reason", "seconds", "known_after" (seconds since the run began)}``; of distributions, the
        error of rows in ulps, ``{"op", "dtype", "quantity", "rows", "ours", "plain"}``; of failures ``{"op", "property", "dtype",
        "facet", "family", "error", "bound", "message", "reproducer"}``.

    Raises:
        ValueError: an unknown operator or facet, no target, examples below 1.
    """
    if not targets or any(op not in KINDS for op in targets):
        raise ValueError(f"targets has {', '.join(map(repr, targets)) or 'nothing'}; allowed are {', '.join(KINDS)}")
    if examples < 1:
        raise ValueError(f"examples is {examples}; at least 1 is needed")
    chosen = tuple(SENTENCES) if facets is None else facets
    if unknown := [name for name in chosen if name not in SENTENCES]:
        raise ValueError(f"facets has {', '.join(map(repr, unknown))}; allowed are {', '.join(SENTENCES)}")
    begin, clock = time.monotonic(), time.time()
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    most = longest or (max(cases.LENGTHS["long"]) if at.type == "cuda" else 2049)
    named = where or {op: f"coordroute:{op}" for op in targets}
    ordered = tuple(name for name in SENTENCES if name in chosen)
    parts = _parts(targets, named, at, examples, seed, dtypes, ordered, most, variants)
    if workers is None:
        workers = default_workers(at) if where else 1
    total = sum(part.rows for part in parts)
    done = 0

    def say(text: str, rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            spent = time.monotonic() - begin
            left = spent / done * (total - done) if 100 <= done < total else None
            progress(total, min(done, total), text, left)

    pool = _Pool(targets, workers, say)

    def late() -> bool:
        return seconds is not None and time.monotonic() - begin > seconds

    try:
        results = pool.perform(list(parts), late)
        cut = _Outcome(reason="there was no time left for all of it")
        outcomes = [(part, one if isinstance(one, _Outcome) else cut) for part, one in zip(parts, results, strict=True)]
        found = _found_of(outcomes)
        _shrink_all(pool, found)
    finally:
        pool.close()
    rows = _property_rows(parts, outcomes, found)
    say("done", total - done)
    return {
        "seed": seed,
        "examples": examples,
        "seconds": round(time.monotonic() - begin, 1),
        "ok": all(row["verdict"] != "fail" for row in rows),
        "properties": rows,
        "facets": [_facet_row(part, one, clock) for part, one in _merged(outcomes, lambda part: (part.op, part.dtype, part.facet))],
        "distributions": _distributions(outcomes),
        "failures": [_failure_row(name, part, failure) for (_, _, name), (part, failure) in found.items()],
    }


Found = dict[tuple[str, str, str], tuple[_Part, _Failure]]
"""(op, dtype, property) -> where it failed first, and on what."""


def _found_of(outcomes: list[tuple[_Part, _Outcome]]) -> Found:
    found: Found = {}
    for part, outcome in outcomes:
        for name, failure in outcome.failures.items():
            found.setdefault((part.op, part.dtype, name), (part, failure))
    return found


def _shrink_all(pool: _Pool, found: Found) -> None:
    """Shrinks the counterexamples, those of the first dtype first; each has its share of the time."""
    order = sorted((key for key in found if not found[key][1].lost and key[2] != "variants"), key=lambda key: DTYPES.index(key[1]))
    seconds = min(SHRINK_SECONDS, SHRINK_SECONDS_IN_ALL * max(pool.count, 1) / max(len(order), 1))
    tasks: list[Task] = [_Shrink(*found[key], seconds) for key in order]
    for key, smaller in zip(order, pool.perform(tasks), strict=True):
        if isinstance(smaller, _Failure):
            found[key] = (found[key][0], smaller)


def _merged(outcomes: list[tuple[_Part, _Outcome]], key: Callable[[_Part], Any]) -> list[tuple[_Part, _Outcome]]:
    """The outcomes of parts of one key as one."""
    merged: dict[Any, tuple[_Part, _Outcome]] = {}
    for part, outcome in outcomes:
        _, whole = merged.setdefault(key(part), (part, _Outcome()))
        whole.merge(outcome)
        whole.reason = whole.reason or outcome.reason
    return list(merged.values())


def _property_rows(parts: list[_Part], outcomes: list[tuple[_Part, _Outcome]], found: Found) -> list[dict[str, Any]]:
    merged = {(part.op, part.dtype): one for part, one in _merged(outcomes, lambda part: (part.op, part.dtype))}
    rows = []
    for op, dtype in dict.fromkeys((part.op, part.dtype) for part in parts):
        outcome = merged.get((op, dtype), _Outcome())
        for name, one in PROPERTIES.items():
            if op not in one.kinds:
                continue
            failing = [part.facet for part, its in outcomes if (part.op, part.dtype) == (op, dtype) and name in its.failures]
            failure = found.get((op, dtype, name))
            tally = outcome.tallies.get(name, _Tally())
            verdict, reason = "pass", ""
            if failure is not None:
                verdict, reason = "fail", failure[1].finding.message
            elif tally.share > compare.KINK_SHARE:
                verdict = "fail"
                reason = f"{tally.share:.0%} of the rows lie at a kink and were left out; at most {compare.KINK_SHARE:.0%} may"
            elif not tally.rows:
                verdict, reason = "not run", _why_not_run(name, dtype, parts)
            rows.append(
                {
                    "op": op,
                    "property": name,
                    "sentence": one.sentence,
                    "derivation": one.bound,
                    "dtype": dtype,
                    "cases": tally.rows,
                    "left_out": tally.left_out,
                    "worst_error": _number(tally.error),
                    "bound": _number(tally.bound),
                    "worst_ratio": _number(max(tally.ratio, 0.0)) if tally.rows else None,
                    "worst_family": tally.family,
                    "failing_facets": list(dict.fromkeys(failing)),
                    "verdict": verdict,
                    "reason": reason,
                }
            )
    return rows


def _why_not_run(name: str, dtype: str, parts: list[_Part]) -> str:
    if name == "variants":
        return "no other launches are known"
    if name in ("side stream", "CUDA graph") and torch.device(parts[0].device).type != "cuda":
        return "only on a GPU"
    if name == "gradcheck" and dtype != "float64":
        return "only in float64"
    if name == "opcheck":
        return "it calls no registered operator"
    return "no case came to it"


def _facet_row(part: _Part, outcome: _Outcome, clock: float) -> dict[str, Any]:
    verdict = "fail" if outcome.failures else ("pass" if outcome.rows else "not run")
    return {
        "op": part.op,
        "dtype": part.dtype,
        "facet": part.facet,
        "sentence": SENTENCES[part.facet],
        "rows": outcome.rows,
        "failed": [name for name in PROPERTIES if name in outcome.failures],
        "verdict": verdict,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 1),
        "known_after": round(outcome.ended - clock, 1),
    }


def _distributions(outcomes: list[tuple[_Part, _Outcome]]) -> list[dict[str, Any]]:
    rows = []
    for part, outcome in _merged(outcomes, lambda part: (part.op, part.dtype)):
        for quantity, arrays in outcome.errors.items():
            both = np.concatenate(arrays, axis=1)
            if both.shape[1]:
                summary = {"op": part.op, "dtype": part.dtype, "quantity": quantity, "rows": both.shape[1]}
                rows.append(summary | {"ours": _distribution(both[0]), "plain": _distribution(both[1])})
    return rows


def _distribution(values: Array) -> dict[str, Any]:
    """Quantiles, and a histogram over powers of two: [exponent, count], exponent -24 for what is smaller, or 0."""
    exponents = np.clip(np.floor(np.log2(np.maximum(values, 2.0**-24))), -24, 64).astype(int)
    found, counts = np.unique(exponents, return_counts=True)
    p50, p999 = np.quantile(values, [0.5, 0.999])
    return {
        "p50": float(p50),
        "p99.9": float(p999),
        "max": float(values.max()),
        "histogram": [[int(one), int(count)] for one, count in zip(found, counts, strict=True)],
    }


def _failure_row(name: str, part: _Part, found: _Failure) -> dict[str, Any]:
    case, finding, at = found.case, found.finding, found.finding.worst
    size = f"{len(case.rows)} row(s) of {case.n}"
    return {
        "op": part.op,
        "property": name,
        "dtype": case.dtype,
        "facet": part.facet,
        "family": case.rows[at][0],
        "error": _number(float(finding.error[at])),
        "bound": _number(float(finding.bound[at])),
        "message": f"{part.op} {case.dtype}, {part.facet}, {size}: {finding.to_text()} (family {case.rows[at][0]!r})",
        "reproducer": "" if name == "variants" else _reproducer(name, part.where, case, part.device),
    }


def _number(value: float | None) -> float | None:
    """None where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None
