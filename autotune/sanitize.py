"""NVIDIA's compute-sanitizer over every launch configuration that serves a device: what `coordroute sanitize` does.

The tools (https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer/index.html):

    memcheck   accesses out of bounds or misaligned
    racecheck  hazards in shared memory, and in that alone
    initcheck  reads of global memory that nobody has written
    synccheck  barriers that not all threads reach, or with wrong arguments

First all launches (launches.py) run without a tool, in several processes, which compiles them into Triton's cache; then each tool
runs processes for each group of them, side by side, on all GPUs of the kind. Such a process is this module run as a program under
the sanitizer. It keeps a journal, and a group counts as finished only if the journal says that every launch ended: some sanitizers
end with status 0 and "0 errors" where the program did not even start. Each tool must also report a fault that was planted for it
(planted.py).

Torch's caching allocator is off in all of these processes (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that each tensor is an
allocation of its own and a single number beyond its end is seen; memcheck pads the allocations too. No kernel is left out by
name: where kernels are, releases before 2026.4 do not see what these initialise, and initcheck would report it. Reports on kernels
that are not ours, whose names are those of C++, are counted apart instead. Failed API calls are not reported, since torch tries
calls that may fail; where one of ours fails, the launch raises.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from . import device as devices
from . import launches
from .launches import Case
from .proof import one_line

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

SECONDS = 240.0
"""How long it may all take; what has not ended by then is ended, and said to be not finished."""

PART, PART_WAITING, PART_RACES = 24, 8, 2
"""Launches of a process; of one whose programs wait for each other; and where racecheck looks at these, its slowest work."""

KEPT_REPORTS = 5
"""Reports of each tool that are kept."""

ERRORS_STATUS = 86
"""What the sanitizer is told to end with where it found errors."""

BINARY = "compute-sanitizer"
LIBRARY = "libsanitizer-collection.so"
HOW_TO_GET = (
    "pip install nvidia-cuda-sanitizer-api, of the release of CUDA that torch is built with (such as"
    " 'nvidia-cuda-sanitizer-api==13.0.*'), or install the CUDA toolkit; --sanitizer PATH names one that lies elsewhere"
)

PROGRAM = (sys.executable, "-P", "-m", __name__)
"""What is run, and run under the sanitizer."""

Progress = Callable[[int, int, str, "float | None"], None]


# --- the tool itself -------------------------------------------------------------------------------------------------


class NotFound(RuntimeError):
    """There is no compute-sanitizer that can run; the message says where it was looked for, and how to get it."""


class Sanitizer(NamedTuple):
    """A compute-sanitizer that runs: the beginning of its command line, and its version."""

    command: tuple[str, ...]
    version: str


def find(given: str | None = None) -> Sanitizer:
    """The compute-sanitizer at ``given``, or else on PATH, of CUDA_HOME or CUDA_PATH, or of an installed package of NVIDIA's.

    Raises:
        NotFound: there is none, or it does not run.
    """
    candidates = [Path(given).expanduser()] if given is not None else _candidates()
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        where = f"{BINARY} was not found on PATH, in CUDA_HOME or in a package" if given is None else f"{given!r} is no file"
        raise NotFound(f"{where}: {HOW_TO_GET}")
    if not os.access(path, os.X_OK):
        raise NotFound(f"{str(path)!r} is not executable, which some packages of NVIDIA's leave to be done: chmod +x {path}")
    command = [str(path.absolute())]
    libraries = path.resolve().parent.parent / "lib"
    if not (path.resolve().parent / LIBRARY).exists() and (libraries / LIBRARY).exists():
        # the layout of the packages up to CUDA 13.0, in which it does not look there by itself
        command += ["--injection-path", str(libraries)]
    try:
        done = subprocess.run([command[0], "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotFound(f"{str(path)!r} does not run ({one_line(error)}): {HOW_TO_GET}") from error
    version = re.search(r"^Version (\S+)", done.stdout, re.MULTILINE)
    if version is None:
        raise NotFound(f"{str(path)!r} says no version (exit status {done.returncode}), as compute-sanitizer does: {HOW_TO_GET}")
    return Sanitizer(tuple(command), version[1])


def _candidates() -> list[Path]:
    on_path = shutil.which(BINARY)
    found = [Path(on_path)] if on_path else []
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for toolkit in [*toolkits, Path("/usr/local/cuda")]:
        found += [toolkit / "bin" / BINARY, toolkit / "compute-sanitizer" / BINARY]
    package = find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        found += sorted([*Path(folder).glob(f"*/{BINARY}/{BINARY}"), *Path(folder).glob(f"*/bin/{BINARY}")], reverse=True)
    return found


# --- what it says ----------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """One report: its text, the kernel that it is about ("" where it names none), and whether that is none of ours."""

    kernel: str
    foreign: bool
    text: str


class Log(NamedTuple):
    """What a log says.

    Attributes:
        total: errors (racecheck: hazards) by the summary; None where there is no summary.
        reports: those that are printed.
        trouble: what the sanitizer says of its own failures.
    """

    total: int | None
    reports: list[Report]
    trouble: list[str]

    @property
    def foreign(self) -> int:
        return sum(report.foreign for report in self.reports)

    @property
    def errors(self) -> int:
        """All but those on kernels that are not ours; a report that was not printed counts."""
        return max((self.total or 0) - self.foreign, len(self.reports) - self.foreign)


_SUMMARY = re.compile(r"(?:ERROR SUMMARY: ([\d,]+) errors?|RACECHECK SUMMARY: ([\d,]+) hazards? displayed.*)\s*$")
_REPORT = re.compile(
    r"(?:(?:error|warning|info): )?(?:potential|race reported)|invalid |uninitialized |host api|barrier error|malloc/free"
    r"|program hit|deadlock|leaked |unused |warpgroup|stack overflow|out-of-range|misaligned",
    re.IGNORECASE,
)
_KERNEL = re.compile(r"\bat (.+?)\+0x[0-9a-f]+")
_HARMLESS = re.compile(
    r"COMPUTE-SANITIZER|LEAK SUMMARY|Tracking kernels launched by child|Warning: (?!.*incorrect)|.* not printed\."
)


def parse(text: str) -> Log:
    """Reads what compute-sanitizer wrote to its log."""
    totals, blocks, trouble = [], [], []
    block: list[str] | None = None
    for line in text.splitlines():
        found = re.match(r"\s*=========(.*)", line)
        if found is None:
            continue
        said = found[1].removeprefix(" ")
        if said.startswith(" ") or not said.strip():
            # the rest of a report is indented
            if block is not None and said.strip():
                block.append(said.strip())
            continue
        block = None
        summary = _SUMMARY.match(said)
        if summary:
            totals.append(int((summary[1] or summary[2]).replace(",", "")))
        elif _REPORT.match(said):
            block = [said.strip()]
            blocks.append(block)
        elif not _HARMLESS.match(said):
            trouble.append(said.strip())
    return Log(sum(totals) if totals else None, [_report(lines) for lines in blocks], trouble)


def _report(lines: Sequence[str]) -> Report:
    found = _KERNEL.search("\n".join(lines))
    kernel = found[1] if found else ""
    return Report(kernel, "::" in kernel, "\n".join(lines))


# --- the processes ---------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One process: the launches of ``cases``, or where there are none the fault planted for ``tool``; under the tool if any."""

    name: str
    tool: str
    group: str
    cases: list[Case]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0
    ended: float = 0.0
    killed: bool = False
    _said: IO[bytes] | None = field(default=None, repr=False)

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.name}.journal"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self, device: str, sanitizer: Sanitizer) -> None:
        what = f"planted:{self.tool}"
        if self.cases:
            what = str(self.folder / f"{self.name}.json")
            Path(what).write_text(json.dumps([case.to_json() for case in self.cases]))
        command = [*PROGRAM, device, str(self.journal), what]
        if self.tool:
            command = [*sanitizer.command, *_options(self.tool, self.log), *command]
        environment = dict(os.environ) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        if device.startswith("cuda"):
            environment.pop("TRITON_INTERPRET", None)
        self._said = (self.folder / f"{self.name}.out").open("wb")
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them itself
        )

    def over(self) -> bool:
        if self.process is None or self.process.poll() is None:
            return False
        if not self.ended:
            self.ended = time.monotonic()
            if self._said is not None:
                self._said.close()
        return True

    def kill(self) -> None:
        """Ends the process, the sanitizer's own ones, and the one that it runs."""
        if self.process is None or self.over():
            return
        self.killed = True
        pids = [event["pid"] for event in self.events() if "pid" in event]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.over()

    def events(self) -> list[dict[str, Any]]:
        try:
            lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_words(self) -> str:
        try:
            lines = (self.folder / f"{self.name}.out").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def read_log(self) -> Log:
        try:
            return parse(self.log.read_text(errors="replace"))
        except OSError:
            return Log(None, [], [])


def _options(tool: str, log: Path) -> list[str]:
    options = ["--tool", tool, "--log-file", str(log).replace("%", "%%")]
    options += ["--error-exitcode", str(ERRORS_STATUS), "--print-limit", "1000", "--show-backtrace", "device"]
    # a kernel that it stops does not keep the others from being looked at; what Triton starts to compile is no CUDA program
    options += ["--destroy-on-device-error", "kernel", "--target-processes", "application-only", "--launch-timeout", "60"]
    return options + (["--padding", "512", "--report-api-errors", "no"] if tool == "memcheck" else [])


def _run_all(jobs: Sequence[Job], gpus: Sequence[str], sanitizer: Sanitizer, deadline: float, tell: Callable[[], None]) -> None:
    """Runs the jobs, one a core, in their order, on the GPUs in turn; at the deadline what has not ended is killed."""
    turn = itertools.cycle(gpus)
    width = devices.usable_cores()
    waiting, running = list(jobs), list[Job]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            running = [job for job in running if not job.over()]
            while waiting and len(running) < width:
                job = waiting.pop(0)
                job.start(next(turn), sanitizer)
                running.append(job)
            tell()
            time.sleep(0.1)
    finally:
        for job in running:
            job.kill()


# --- the verdicts ----------------------------------------------------------------------------------------------------


def judge(job: Job) -> dict[str, Any]:
    """What became of a job: launches, configurations, errors, verdict, reason and seconds."""
    events = job.events()
    ended = [job.cases[event["end"]] for event in events if "end" in event]
    failed = [event for event in events if "failed" in event]
    log = job.read_log()
    reason = ""
    if job.process is None:
        reason = "no time was left to begin it"
    elif job.killed:
        begun = [event["begin"] for event in events if "begin" in event]
        at = f" at {_named(job.cases[begun[-1]])}" if begun and len(begun) > len(ended) + len(failed) else ""
        reason = f"no time was left to end it{at}"
    elif failed and job.cases:
        reason = f"{_named(job.cases[failed[0]['failed']])}: {failed[0]['error']}"
    elif not any("done" in event for event in events):
        words = [*log.trouble, job.last_words(), "it said nothing"]
        reason = f"the launches did not all end (exit status {job.process.returncode}): {next(filter(None, words))}"
    elif job.tool and log.total is None:
        reason = "the log has no summary"
    elif log.trouble:
        reason = log.trouble[0]
    elif job.process.returncode not in (0, ERRORS_STATUS) or (job.process.returncode and not log.total):
        reason = f"exit status {job.process.returncode}, though the log has no error: {job.last_words()}"
    errors = log.errors if job.tool else 0
    return {
        "group": job.group,
        "launches": 2 * len(ended),
        "planned": 2 * len(job.cases),
        "configurations": len({one for case in ended for one in case.configurations()}),
        "errors": errors,
        "foreign": log.foreign,
        "verdict": "errors" if errors else "not finished" if reason else "clean",
        "reason": reason,
        "seconds": round(max(job.ended - job.begun, 0.0), 1),
    }


def _judge_all(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One row a group, of all its processes."""
    found = []
    for group in dict.fromkeys(job.group for job in jobs):
        own = [job for job in jobs if job.group == group]
        rows = [judge(job) for job in own]
        row = {"group": group} | {name: sum(row[name] for row in rows) for name in ("launches", "planned", "errors", "foreign")}
        row["configurations"] = _configurations(own)
        row["verdict"] = _verdict(rows)
        row["reason"] = next((row["reason"] for row in rows if row["reason"]), "")
        row["seconds"] = round(sum(row["seconds"] for row in rows), 1)
        found.append(row)
    return found


def _configurations(jobs: Sequence[Job]) -> int:
    """How many different ones are in the launches that ended."""
    ended = [job.cases[event["end"]] for job in jobs for event in job.events() if "end" in event]
    return len({one for case in ended for one in case.configurations()})


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    verdicts = {row["verdict"] for row in rows}
    return "errors" if "errors" in verdicts else "not finished" if verdicts != {"clean"} else "clean"


def _named(case: Case) -> str:
    """A case for a person, such as "soft_topk float32 3x6143 odd (resident 8192x1, 4 warps | resident 8192x1, 8 warps)"."""
    forward, backward = (
        f"{config.variant} {config.block}x{max(config.rows_per_program, config.programs_per_row)}, {config.num_warps} warps"
        for config in (case.forward, case.backward)
    )
    return f"{case.op} {case.dtype} {case.rows}x{case.n} {case.inputs} ({forward} | {backward})"


def _of_tool(tool: str, planted: Job, jobs: Sequence[Job], located: Sequence[Job]) -> dict[str, Any]:
    """The row of one tool in the evidence."""
    groups = _judge_all(jobs)
    blind = _blind(planted)
    verdict = _verdict(groups)
    timed = [job for job in jobs if job.ended]
    return {
        "tool": tool,
        "sees_planted_fault": not blind,
        "launches": sum(group["launches"] for group in groups),
        "configurations": _configurations(jobs),
        "errors": sum(group["errors"] for group in groups),
        "verdict": "not finished" if blind and verdict == "clean" else verdict,
        "reason": blind or next((f"{group['group']}: {group['reason']}" for group in groups if group["reason"]), ""),
        "seconds": round(max((job.ended for job in timed), default=0.0) - min((job.begun for job in timed), default=0.0), 1),
        "groups": groups,
        "reports": [
            {"group": job.group, "kernel": report.kernel, "text": report.text}
            for job in jobs
            for report in job.read_log().reports
            if not report.foreign
        ][:KEPT_REPORTS],
        "cases": [_named(job.cases[0]) for job in located if job.read_log().errors],
    }


def _blind(planted: Job) -> str:
    """Why a tool is not known to see anything, or "" where it reported the fault that was planted for it."""
    if any("_planted_" in report.text for report in planted.read_log().reports):
        return ""
    said = judge(planted)["reason"] or "it reports no error"
    return f"it does not see the fault that was planted for it: {said}"


# --- the whole -------------------------------------------------------------------------------------------------------


def run(
    device: torch.device,
    sanitizer: Sanitizer,
    tools: Sequence[str],
    seconds: float,
    progress: Progress,
    self_check: bool = False,
    gpus: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the tools over all launches of :func:`launches.plan`.

    Args:
        device: a GPU.
        sanitizer: what :func:`find` found.
        tools: of TOOLS.
        seconds: how long it may take.
        progress: called with (total, done, text, seconds left) now and then; done are cases.
        self_check: only the planted faults.
        gpus: names of devices of the same kind to share the work; that one alone where there are none.

    Returns:
        The evidence: device, versions (the sanitizer's too), date, seconds, ok, and for each tool ``{"tool", "launches",
        "configurations", "errors", "verdict": "clean" | "errors" | "not finished", "seconds" (from the first of its
        processes to the last), "reports"}`` with its groups (whose "seconds" are added up over their processes). ``cases``
        are the launches that were seen to err one by one.
    """
    begin = time.monotonic()
    deadline = begin + seconds
    gpus = gpus or (str(device),)
    cases = [] if self_check else launches.plan(launches.configured(device), devices.identity(device).sm_count)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    with tempfile.TemporaryDirectory(prefix="coordroute-sanitize-") as name:
        folder = Path(name)
        planted = {tool: Job(f"planted-{tool}", tool, "the planted fault", [], folder) for tool in tools}
        # the rows of "special" need no binary of their own
        parts = _parts([case for case in cases if case.inputs != "special"], os.cpu_count() or 1)
        compiling = [Job(f"compile-{i}", "", "compilation", part, folder) for i, part in enumerate(parts)]
        checks = [
            Job(f"{tool}-{i}-{j}", tool, group, part, folder)
            for tool in tools
            for i, (group, own) in enumerate(groups.items())
            for j, part in enumerate(_parts(own, -(-len(own) // _part(tool, group))))
        ]
        # programs that wait for each other take longest
        checks.sort(key=lambda job: ("split" not in job.group, job.tool != "racecheck"))
        every = [*compiling, *checks]

        def tell(text: str) -> None:
            done = sum(1 for job in every for event in job.events() if "end" in event or "failed" in event)
            progress(sum(len(job.cases) for job in every), done, text, None)

        def go(jobs: Sequence[Job], text: str) -> None:
            _run_all(jobs, gpus, sanitizer, deadline, lambda: tell(text))

        go([*compiling, *planted.values()], "compiling, and faults that the tools must see")
        seeing = [job for job in checks if not _blind(planted[job.tool])]
        go(seeing, "under the sanitizer")
        bad = [job for job in seeing if job.read_log().errors and len(job.cases) > 1]
        located = [Job(f"{job.name}-{i}", job.tool, job.group, [case], folder) for job in bad for i, case in enumerate(job.cases)]
        go(located, "each launch of what has errors by itself")
        found = [
            _of_tool(
                tool,
                planted[tool],
                [job for job in checks if job.tool == tool],
                [job for job in [*located, *seeing] if job.tool == tool and len(job.cases) == 1],
            )
            for tool in tools
        ]
    good = [row["sees_planted_fault"] if self_check else row["verdict"] == "clean" for row in found]
    return {
        "schema": 1,
        "command": "sanitize",
        "device": devices.describe(device),
        "versions": devices.versions() | {BINARY: sanitizer.version},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "self_check": self_check,
        "ok": all(good),
        "tools": found,
    }


def _part(tool: str, group: str) -> int:
    if "split" not in group:
        return PART
    return PART_RACES if tool == "racecheck" else PART_WAITING


def _parts(cases: Sequence[Case], count: int) -> Iterable[list[Case]]:
    return filter(None, ([*cases[i::count]] for i in range(count)))


# --- the program under the sanitizer ---------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Launches what it is given: DEVICE, JOURNAL, and a file of cases or ``planted:TOOL``."""
    name, journal_path, what = arguments
    device = torch.device(name)
    with open(journal_path, "w", encoding="utf-8", buffering=1) as journal:

        def note(**event: Any) -> None:
            journal.write(json.dumps(event) + "\n")

        note(pid=os.getpid())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if what.startswith("planted:"):
            from . import planted

            planted.launch(what.removeprefix("planted:"), device)
        else:
            for index, data in enumerate(json.loads(Path(what).read_text(encoding="utf-8"))):
                note(begin=index)
                try:
                    launches.run(Case.from_json(data), device)
                except Exception as error:
                    note(failed=index, error=one_line(error))
                else:
                    note(end=index)
        note(done=True)


if __name__ == "__main__":
    main(sys.argv[1:])
