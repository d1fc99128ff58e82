"""Runs the reduced verification suite on every mutant, each in a process of its own, and says which it finds.

    python tests/mutation/run.py --device cpu|cuda [--only NAME …] [--json FILE] [--workers N]
    python tests/mutation/run.py --device cpu|cuda --false-alarms 1000 [--json FILE]

A mutant is a copy of the package's sources in a temporary folder with one fault in it (catalogue.py). It is killed when a check
of the suite fails (suite.py), or when its process crashes or hangs. The package without a fault is the control: it must pass.
On a CPU the Triton kernels run in Triton's interpreter.

With ``--false-alarms`` only the package without a fault is run, with so many seeds: not one check may fail.

Exit status: 0 every mutant is killed, or known to be the same as the original; 1 one survived, the control failed, or a false
alarm; 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from catalogue import CATALOGUE, Mutant

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
FOLDERS = ("kernels", "reference", "autotune")
BOTH = ("soft_topk", "coordinate_descent")

ENVIRONMENT = {
    "COORDROUTE_TUNED": "0",  # the heuristic's launches, whatever was tuned here
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA in a process that is forked
}


@dataclass
class Job:
    """One process: a package in a folder, and what of the suite is run on it.

    Attributes:
        name: of the mutant; "" where the package has no fault.
        root: the folder that holds the package.
        place: of sight.
        ops: operators whose checks are run.
        share: (i, n): of the checks every n-th from the i-th on, or all of them by (0, 1).
        seeds: of the inputs.
        parts: with many seeds, into how many parts the suite is cut; each seed takes one in turn.
        quick: only the first check of each operator.
        stop: whether the first failure ends it.
    """

    name: str
    root: str
    place: str
    ops: tuple[str, ...] = BOTH
    share: tuple[int, int] = (0, 1)
    seeds: tuple[int, ...] = (0,)
    parts: int = 1
    quick: bool = False
    stop: bool = True


@dataclass
class Outcome:
    """What became of a job: checks done, and failures as (seed, check, property, counterexample)."""

    seconds: float = 0.0
    checks: int = 0
    runs: int = 0
    failures: list[tuple[int, str, str, str]] = field(default_factory=list)


# --- in the process of a job -----------------------------------------------------------------------------------------


def _work(pipe: Any, job: Job) -> None:
    """Runs a job, and tells the parent: ("begin", what), ("wrong", seed, check, property, text), ("run",) a seed, and ("end",)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.path.insert(0, job.root)
    pipe.send(("begin", "import"))
    try:
        import coordroute

        if Path(str(coordroute.__file__)).resolve().parent != (Path(job.root) / "coordroute").resolve():
            raise ImportError("another coordroute was imported than the one to be judged")
        import suite

        suite.quiet()
        suite.guard(job.place)
        checks = suite.checks(job.place, job.ops)[: len(job.ops) if job.quick else None]
    except Exception as error:
        pipe.send(("wrong", job.seeds[0], "import", "imports", f"{type(error).__name__}: {error}"[:400]))
        pipe.send(("end",))
        return
    for number, seed in enumerate(job.seeds):
        if job.parts > 1:
            length = -(-len(checks) // job.parts)
            # processes begin at different parts: what takes most memory is in one of them
            chosen = checks[(job.seeds[0] + number) % job.parts * length :][:length]
        else:
            chosen = checks[job.share[0] :: job.share[1]]
        for check in chosen:
            label = f"{check.op}: {check.label}"
            pipe.send(("begin", label))
            try:
                wrong = check.run(seed)
            except Exception as error:
                wrong = [("runs", f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])]
            for name, text in wrong:
                pipe.send(("wrong", seed, label, name, text))
            if wrong and job.stop:
                pipe.send(("end",))
                return
        pipe.send(("run",))
    pipe.send(("end",))


# --- in the parent ---------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    job: Job
    process: Any
    begin: float
    heard: float
    doing: str = "start"
    outcome: Outcome = field(default_factory=Outcome)
    ended: bool = False


def work_off(
    jobs: list[Job], workers: int, limit: float, say: Any, start: str = "forkserver", until: float = math.inf
) -> list[Outcome | None]:
    """Runs jobs side by side, in order; None for those that were not begun since the control had failed, or not done in time.

    Args:
        jobs: those of the control are the ones without a name that stop at a failure.
        workers: processes at a time.
        limit: seconds that one check may take; a process that takes longer is killed.
        say: called with (job, outcome) when one has ended.
        start: how a process is started: "forkserver", where torch is loaded once for all, or "spawn".
        until: when to stop, as time.monotonic() tells it; of runs for false alarms, those that are done then count.
    """
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["numpy", "torch", "triton", "torch._dynamo"])
    waiting = list(enumerate(jobs))
    outcomes: list[Outcome | None] = [None] * len(jobs)
    running: dict[Any, tuple[int, _Running]] = {}

    def finish(pipe: Any) -> None:
        at, one = running.pop(pipe)
        one.outcome.seconds = round(time.monotonic() - one.begin, 1)
        outcomes[at] = one.outcome
        pipe.close()
        say(one.job, one.outcome)
        if one.outcome.failures and not one.job.name and one.job.stop:
            waiting.clear()

    try:
        while waiting or running:
            if time.monotonic() > until:
                for at, one in running.values():
                    outcomes[at] = None if one.job.stop else one.outcome
                break
            while waiting and len(running) < workers:
                at, job = waiting.pop(0)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()
                now = time.monotonic()
                running[mine] = (at, _Running(job, process, now, now))
            for pipe in multiprocessing.connection.wait(list(running), timeout=1.0):
                _, one = running[pipe]
                _hear(pipe, one)
                if one.ended:
                    finish(pipe)
            for pipe, (_, one) in list(running.items()):
                if time.monotonic() - one.heard > limit:
                    one.process.kill()
                    one.process.join(20)
                    one.outcome.failures.append((-1, one.doing, "hangs", f"not done after {limit:.0f} s: {one.doing}"))
                    finish(pipe)
    finally:
        for _, one in running.values():
            one.process.kill()
    return outcomes


def _hear(pipe: Any, one: _Running) -> None:
    one.heard = time.monotonic()
    try:
        kind, *rest = pipe.recv()
    except EOFError:
        one.process.join(20)
        text = f"its process ended with exit status {one.process.exitcode}: {one.doing}"
        one.outcome.failures.append((-1, one.doing, "crashes", text))
        one.ended = True
        return
    if kind == "begin":
        one.doing = rest[0]
        one.outcome.checks += one.doing != "import"
    elif kind == "wrong":
        one.outcome.failures.append(tuple(rest))
    elif kind == "run":
        one.outcome.runs += 1
    else:
        one.process.join(20)
        one.ended = True


def copied(folder: Path, mutant: Mutant | None) -> str:
    """A copy of the package's sources, with the fault of ``mutant``, and of the suite: a folder for the import path."""
    package = folder / "coordroute"
    package.mkdir(parents=True)
    for source in (*REPOSITORY.glob("*.py"), *(path for name in FOLDERS for path in (REPOSITORY / name).glob("*.py"))):
        target = package / source.relative_to(REPOSITORY)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    shutil.copyfile(HERE / "suite.py", folder / "suite.py")
    if mutant is not None:
        faulty = package / mutant.file
        faulty.write_text(mutant.applied(faulty.read_text()))
    return str(folder)


def place_of(mutant: Mutant, device: str) -> str | None:
    """Where a mutant is looked for on a device; None where it cannot be seen."""
    order = ("gpu", "cpu") if device == "cuda" else ("cpu", "interpreter")
    return next((place for place in order if place in mutant.where), None)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: str) -> str:
    """What it runs on. A GPU is asked for in a process of its own: this one must not hold it."""
    if device == "cuda":
        ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def control_jobs(root: str, place: str, ops: tuple[str, ...], workers: int, quick: bool) -> list[Job]:
    """The whole suite of a place on the package without a fault; on a GPU cut up, for it is what compiles every kernel."""
    if place == "gpu" and not quick:
        return [Job("", root, place, ops, (at, workers)) for at in range(workers)]
    return [Job("", root, place, ops, quick=quick)]


def run_mutants(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    chosen = [one for one in CATALOGUE if not options.only or one.name in options.only]
    places = {one.name: place_of(one, options.device) for one in chosen}
    if options.place:
        places = {name: place if place == options.place else None for name, place in places.items()}
    clean = copied(folder / "control", None)
    jobs: list[Job] = []
    for place in ("interpreter", "gpu", "cpu"):
        wanted = {op for one in chosen if places[one.name] == place for op in one.ops}
        if wanted:
            jobs += control_jobs(clean, place, tuple(op for op in BOTH if op in wanted), options.workers, options.quick)
    first = len(jobs)
    # what needs no compiler goes first: it fills the cores while the control still compiles
    order = sorted((one for one in chosen if places[one.name]), key=lambda one: places[one.name] != "cpu")
    for number, one in enumerate(order):
        root = copied(folder / f"mutant{number}", one)
        jobs.append(Job(one.name, root, str(places[one.name]), one.ops, quick=options.quick))
    begin, done = time.monotonic(), 0

    def say(job: Job, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        found = f"{outcome.failures[0][2]} ({outcome.failures[0][1]})" if outcome.failures else "nothing fails"
        who = job.name or f"control {job.place} {job.share[0] + 1}"
        print(f"[{done}/{len(jobs)}] {outcome.seconds:6.1f} s  {who}: {found}", flush=True)

    outcomes = work_off(jobs, options.workers, options.limit, say, options.start, begin + options.seconds)
    seconds = round(time.monotonic() - begin, 1)
    control = _control(jobs[:first], outcomes[:first])
    found = dict(zip((one.name for one in order), outcomes[first:], strict=True))
    table = [_row(one, places[one.name], found.get(one.name)) for one in chosen]
    report = {
        "device": device_name(options.device),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": seconds,
        "control": control,
        "mutants": table,
    }
    _print_table(report)
    survived = [row for row in table if row["verdict"] == "survived" and not row["explanation"]]
    return report, control["verdict"] == "passes" and not survived


def _control(jobs: list[Job], outcomes: list[Outcome | None]) -> dict[str, Any]:
    done = [one for one in outcomes if one is not None]
    failures = [failure for one in done for failure in one.failures]
    return {
        "verdict": "fails" if failures or len(done) < len(jobs) else "passes",
        "places": sorted({job.place for job in jobs}),
        "checks": sum(one.checks for one in done),
        "seconds": round(sum(one.seconds for one in done), 1),
        "failures": [{"check": check, "property": name, "counterexample": text} for _, check, name, text in failures],
    }


def _row(one: Mutant, place: str | None, outcome: Outcome | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": one.name, "sentence": one.sentence, "file": one.file, "op": one.op, "where": list(one.where)}
    failure = outcome.failures[0] if outcome is not None and outcome.failures else None
    row["place"] = place
    row["verdict"] = "not run" if outcome is None else "killed" if failure else "survived"
    row["property"], row["check"], row["counterexample"] = (failure[2], failure[1], failure[3]) if failure else (None, None, None)
    row["properties"] = sorted({one[2] for one in outcome.failures}) if outcome is not None else []
    row["seconds"] = None if outcome is None else outcome.seconds
    row["explanation"] = one.equivalent
    return row


def _print_table(report: dict[str, Any]) -> None:
    control, table = report["control"], report["mutants"]
    print(f"\ncontrol {control['verdict']}: {control['checks']} checks at {', '.join(control['places'])}")
    for failure in control["failures"]:
        print(f"  {failure['check']}: {failure['counterexample'][:300]}")
    for row in table:
        if row["verdict"] == "survived":
            print(f"survived: {row['name']}: {row['sentence']}. {row['explanation'] or 'UNEXPLAINED'}")
    count = Counter(row["verdict"] for row in table)
    summary = ", ".join(f"{number} {verdict}" for verdict, number in sorted(count.items()))
    print(f"{len(table)} mutants: {summary}; {report['seconds']:.0f} s on {report['device']}")


def run_false_alarms(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    place = options.place or ("gpu" if options.device == "cuda" else "cpu")
    clean = copied(folder / "control", None)
    begin = time.monotonic()

    def say(job: Job, outcome: Outcome) -> None:
        print(
            f"{outcome.runs} runs, {outcome.checks} checks, {len(outcome.failures)} alarms in {outcome.seconds:.0f} s", flush=True
        )

    if place == "gpu":
        # compiles every kernel once, so that the runs below find them in the cache
        work_off(
            control_jobs(clean, place, BOTH, options.workers, False), options.workers, options.limit, lambda job, outcome: None
        )
    warm = time.monotonic()
    seeds = range(options.first_seed, options.first_seed + options.false_alarms)
    jobs = [
        Job("", clean, place, seeds=tuple(seeds[at :: options.workers]), parts=options.parts, stop=False)
        for at in range(options.workers)
        if len(seeds) > at
    ]
    until = begin + options.seconds
    outcomes = [one for one in work_off(jobs, options.workers, options.limit, say, options.start, until) if one is not None]
    failures = [failure for one in outcomes for failure in one.failures]
    runs = sum(one.runs for one in outcomes)
    report = {
        "device": device_name(options.device),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "place": place,
        "runs": runs,
        "first_seed": options.first_seed,
        "checks": sum(one.checks for one in outcomes),
        "parts": options.parts,
        "seconds": round(time.monotonic() - begin, 1),
        "seconds_compiling": round(warm - begin, 1),
        "failures": [
            {"seed": seed, "check": check, "property": name, "counterexample": text} for seed, check, name, text in failures
        ],
    }
    for seed, check, name, text in failures[:20]:
        print(f"ALARM seed {seed}, {check}, {name}: {text[:400]}")
    print(f"{runs} runs with as many seeds, {report['checks']} checks: {len(failures)} alarms; {report['seconds']:.0f} s")
    return report, not failures and runs == len(seeds)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--device", choices=("cpu", "cuda"), required=True)
    made.add_argument("--only", nargs="+", metavar="NAME", help="mutants of the catalogue; all without it")
    made.add_argument("--place", choices=("cpu", "interpreter", "gpu"), help="only what is looked for there")
    made.add_argument("--quick", action="store_true", help="the first check of each operator only")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) - 2)))
    made.add_argument("--limit", type=float, default=120.0, help="seconds that one check may take")
    made.add_argument("--seconds", type=float, default=math.inf, help="when to stop; what is not done by then is not run")
    made.add_argument("--start", choices=("forkserver", "spawn"), default="forkserver", help="how processes are started")
    made.add_argument("--false-alarms", type=int, metavar="N", help="runs of the package without a fault, each with its own seed")
    made.add_argument("--first-seed", type=int, default=1)
    made.add_argument("--parts", type=int, default=1, help="of --false-alarms: each run takes one of so many parts of the suite")
    return made


def main() -> int:
    options = parser().parse_args()
    unknown = set(options.only or ()) - {one.name for one in CATALOGUE}
    if unknown:
        parser().error(f"--only has {', '.join(map(repr, sorted(unknown)))}; allowed are the names in catalogue.py")
    if options.workers < 1 or options.parts < 1:
        parser().error(f"--workers is {options.workers} and --parts {options.parts}; allowed is at least 1")
    os.environ.update(ENVIRONMENT)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        report, ok = (run_false_alarms if options.false_alarms else run_mutants)(options, folder)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
