"""The command line: each subcommand calls one function of a folder beside this file, and prints.

Exit status: 0 fine, 1 a check failed, 2 bad usage (an argument, an environment variable or a file), 130 interrupted.

What a person reads goes to stdout; progress, warnings and errors go to stderr. torch is imported after the arguments were
parsed, so that help and usage errors are quick. rich is needed for the tables and progress bars of long work alone: ``configs``
and ``env``, which people run where they only use the operators, do without.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn, TextIO

from . import __version__

if TYPE_CHECKING:
    import torch

    from .autotune.store import Explanation, Verdict

OK, CHECK_FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

# copies of what lies in modules that import torch; a test holds them together
OPS = ("soft_topk", "coordinate_descent")
KINDS = (*OPS, "relaxed_topk")
DTYPES = ("float16", "bfloat16", "float32", "float64")
EFFORTS = ("quick", "full")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MEASURED_OPS = ("soft_topk", "coordinate_descent", "copy", "softmax", "topk", "budget_sparsemax")

EXTRA = "pip install 'coordroute[tune]'"
EXTRA_MODULES = ("rich", "hypothesis", "matplotlib")

LINE_SECONDS = 10.0
"""How often progress is a line at most, where stderr is no terminal."""

STDOUT = "-"


class Problem(Exception):
    """Something that the user can mend: one message, no traceback."""

    def __init__(self, message: str, status: int = BAD_USAGE, prog: str = "") -> None:
        super().__init__(message)
        self.status, self.prog = status, prog


# --- output ----------------------------------------------------------------------------------------------------------


def _emit(text: str, stream: TextIO | None = None) -> None:
    """Writes to stdout (or ``stream``). A reader that has gone, such as ``head``, is no error and ends no work."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text if text.endswith("\n") else f"{text}\n")
        stream.flush()
    except OSError as error:
        # what is still buffered must not fail again when the interpreter ends
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise Problem(f"stdout cannot be written to ({_reason(error)})") from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _tell(prog: str, text: object) -> None:
    _emit(f"{prog}: {_one_line(text)}", sys.stderr)


@contextlib.contextmanager
def _readable_warnings(prog: str) -> Iterator[None]:
    """Warnings as one line each, without the source line that caused them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message).removeprefix("coordroute: ")
        ours = category is UserWarning or category.__name__ == "ConfigurationWarning"
        where = f"{category.__name__} ({Path(filename).name}, line {lineno}): "
        _tell(prog, f"warning: {'' if ours else where}{text}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


Cell = str | tuple[str, str]
"""A text, or a text and the style that it has where there are colors."""

WIDE = 4000
"""The width of a console that nobody looks at: wider than any table, so that nothing is wrapped or cut."""


def _need_rich() -> None:
    try:
        import rich.progress
        import rich.table  # noqa: F401
    except ModuleNotFoundError as error:
        raise Problem(f"its tables need the package rich, which is not installed: {EXTRA}, or use --json {STDOUT}") from error


def _console(stream: IO[str]) -> Any:
    from rich.console import Console

    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    colors: Any = "auto" if terminal and not os.environ.get("NO_COLOR") else None
    width = None if terminal else WIDE
    return Console(file=stream, force_terminal=terminal, color_system=colors, width=width, highlight=False, markup=False)


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]]) -> str:
    """A table as text for stdout. ``columns`` are (header, "left", "right" or "fold"); only "fold" columns are wrapped."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header, kind in columns:
        justify: Any = "right" if kind == "right" else "left"
        table.add_column(Text(header), justify=justify, no_wrap=kind != "fold", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else Text(cell[0], style=cell[1]) for cell in row))
    console = _console(sys.stdout)
    # a terminal too narrow for a table wraps its lines; rich would cut the cells
    if Measurement.get(console, console.options.update(width=WIDE), table).minimum > console.width:
        console.width = WIDE
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _columns(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Lines with aligned columns, for what must do without rich."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" " * indent + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _count(number: int | float, what: str, plural: str = "") -> str:
    return f"{number} {what if number == 1 else plural or what + 's'}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Progress:
    """Progress on stderr: a bar where that is a terminal, else a line every ten seconds at most."""

    def __init__(self, prog: str) -> None:
        self.prog = prog
        self.bar: Any = None
        self.task: Any = None
        self.shown = -math.inf

    def __enter__(self) -> _Progress:
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return self
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.table import Column
        except ModuleNotFoundError:  # with --json - nothing else needs it
            return self
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        left = TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True))
        self.bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            left,
            text,
            console=_console(sys.stderr),
            auto_refresh=False,  # a thread that draws would disturb what is timed
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("starting", total=None, left="")
        self.bar.start()
        self.bar.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, total: int, done: int, text: str, seconds_left: float | None) -> None:
        now = time.monotonic()
        left = "" if seconds_left is None else f"about {_duration(seconds_left)} left"
        if self.bar is not None:
            more = {"description": text} if text else {}
            self.bar.update(self.task, total=total, completed=done, left=left, **more)
            if now - self.shown >= 0.1:
                self.shown = now
                self.bar.refresh()
        elif now - self.shown >= LINE_SECONDS:
            self.shown = now
            _tell(self.prog, ", ".join(part for part in (f"{done}/{total}", text, left) if part))


class _KeyTable(_Progress):
    """A progress whose bar has a table of the latest keys above it: where each stands, its best time and gain so far."""

    LATEST = 12

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self.keys: dict[Any, Any] = {}
        self.live: Any = None

    def __enter__(self) -> _KeyTable:
        super().__enter__()
        if self.bar is not None:
            from rich.live import Live

            self.bar.stop()
            self.live = Live(console=self.bar.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, total: int, done: int, text: str, seconds_left: float | None) -> None:
        if self.live is None:
            super().__call__(total, done, text, seconds_left)
            return
        left = "" if seconds_left is None else f"about {_duration(seconds_left)} left"
        more = {"description": text} if text else {}
        self.bar.update(self.task, total=total, completed=done, left=left, **more)
        self.draw()

    def watch(self, status: Any) -> None:
        self.keys.pop(status.key, None)
        self.keys[status.key] = status
        self.draw()

    def draw(self) -> None:
        now = time.monotonic()
        if self.live is None or now - self.shown < 0.1:
            return
        self.shown = now
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name, justify in (("key", "left"), ("", "left"), ("best µs", "right"), ("gain", "right")):
            table.add_column(Text(name), justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for one in list(self.keys.values())[-self.LATEST :]:
            style = {"tuned": "green", "default": "dim", "left out": "red"}.get(one.state, "")
            gain = "-" if one.gain is None else f"{one.gain:.2f}x"
            table.add_row(*(Text(cell, style=style) for cell in (_key_text(one.key._asdict()), one.state, _us(one.best_us), gain)))
        self.live.update(Group(table, self.bar), refresh=True)


# --- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse says "argument --x: invalid choice: 'y' (choose from ...)"; here every message says what is allowed alike
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        message = re.sub(r"^(\S+): it is ", r"\1 is ", message)
        message = re.sub(r"^(\S+): invalid choice: (.*) \(choose from (.*)\)$", r"\1 is \2; allowed is one of \3", message)
        raise Problem(f"{message} (see {self.prog} --help)", prog=self.prog)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            _emit(message, file)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"it is {text!r}; allowed is a whole number of at least {least}")
        return number

    return parse


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,18})[xX]([0-9]{1,18})", text)
    if not found or not (int(found[1]) and int(found[2])):
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed is ROWSxN with both at least 1, such as 1024x8192")
    return int(found[1]), int(found[2])


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(_shape(part.strip()) for part in text.split(",")))


def _some_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name not in allowed:
                names_allowed = ", ".join(allowed)
                raise argparse.ArgumentTypeError(f"it is {text!r}, which names {name!r}; allowed are, with commas, {names_allowed}")
        return names

    return parse


def _reference(text: str) -> str:
    name = r"[^\W\d]\w*"
    if not re.fullmatch(rf"{name}(\.{name})*:{name}", text):
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed is MODULE:FUNCTION, such as mypackage.ops:my_topk")
    return text


EXAMPLES = """\
one example each:
  coordroute autotune                        tune this machine's GPU, or else its CPU
  coordroute verify --examples 1000          check values and gradients against float64
  coordroute benchmark --peers               measure against torch and other packages
  coordroute sanitize                        look for invalid accesses and races on the GPU
  coordroute exhaust --json exhaustive.json  time every candidate of some keys
  coordroute replay exhaustive.json          replay the search on timings of all candidates
  coordroute report --input report           render the JSON files of the first three
  coordroute configs --explain 1024x8192     which configuration serves such a call
  coordroute env                             what a bug report needs

exit status:
  0    fine
  1    a check failed
  2    bad usage: an argument, an environment variable or a file
  130  interrupted with Ctrl-C; autotune has kept what was measured, and goes on
       from there when the same command is run again

`coordroute COMMAND --help` says more; `coordroute env` lists the environment variables.
"""

AUTOTUNE = """\
Finds the fastest launch configurations for this device and writes them to its
configuration file, where model code finds them by itself.

What is found is verified against a float64 oracle, and then timed again beside the
default. It is taken only where it surely beats it. The entry that is written carries
its timing and its proof.

Ctrl-C loses nothing: finished keys are in the file, measurements in a hidden file
beside it, and the same command goes on from there (exit status 130). The exit status
is 1 where a default failed its check or nothing could be tuned.

Under torchrun each process takes a GPU, and each writes the whole file at the end:
  torchrun --nproc-per-node=N -m coordroute autotune
"""

VERIFY = """\
Checks an implementation against float64: values, gradients, certificates of
optimality, determinism, streams and graphs, and more.

Without --op it checks coordroute's own operators. With --op and --kind it checks a
function of yours, called as

  soft_topk           f(scores, k, eps=..., mask=...)
  coordinate_descent  f(scores, k, n_iters=..., eps=..., eps_init=...,
                        eps_decay=..., mask=..., checkpoint_segments=...)
  relaxed_topk        f(scores, k, mask=...), weights in [0, 1] that sum to k, of
                        any other objective: judged by its own float64 run

with scores [rows, n], k a number or a tensor [rows], eps of soft_topk likewise, and
mask bool [rows, n] (True = valid), which is only passed where it masks something. It
returns the weights [rows, n] and is differentiable. mask and checkpoint_segments may
be left out of its signature; what needs them is then not run.

First come facets, kinds of input that differ from plain ones in one thing (lengths,
masks, strides, k near the number of valid entries, ...), so that a failure says what
it hangs on; then rows of all of them at once. Each failure is printed with code that
reproduces it on the smallest input that was found; the exit status is then 1."""

BENCHMARK = """\
Measures our operators, forward and backward, beside torch.softmax, torch.topk, a
copy, and the published recurrence in eager and compiled torch; with --peers also
other packages that are installed. Device time, interleaved, all in one run.

"x softmax" is a time over that of torch.softmax on the same shape and dtype: 2.00
takes twice as long.

The last table says which of the project's targets are met (autotune/targets.py). They
are ratios within this run, in float32; bfloat16 stands beside them. A target that this
run has no figures for is not measured, and says why. A missed target is no failure of
the command. --shapes and --only ask for less."""

SANITIZE = """\
Runs NVIDIA's compute-sanitizer over every launch configuration that serves this GPU:
forward and backward, with and without masks, at whole and odd lengths, and the
heuristic where the files have nothing of a kind.

  memcheck   accesses out of bounds or misaligned
  racecheck  hazards in shared memory
  initcheck  reads of memory that nobody has written
  synccheck  barriers that not all threads reach

Each tool must also see a fault that was planted for it. A tool that did not end in
time is reported as not finished, never as clean. The exit status is 1 where a tool
found an error or is not clean, 2 where there is no compute-sanitizer."""

REPLAY = """\
Replays our search on the recorded timings of every candidate, beside other ways to
search: exhaustive, random, and the strategies of Kernel Tuner and Helion where they
are installed. FILE is from `coordroute exhaust --json FILE`. Needs no GPU.

The regret is by how much what a search took is slower than the best of all
candidates. A search sees the odd rounds of the recording, drawn anew for each seed;
the even rounds judge it. Launches are a share of those of all candidates in all
rounds; the others have as many as ours took, but for exhaustive. A key is stable
where every seed came to the same choice.

The last lines say which of the goals our search meets. A goal that is missed is no
failure of the command."""

REPORT = """\
Renders the JSON files of autotune, verify and benchmark to pages that a person
reads, and prints the paths of what it wrote. Needs no GPU.

Beside them may lie sanitize.json, and mutants.json and false-alarms.json as
tests/mutation/run.py writes them. verify-*.json, which verify --op wrote of other
implementations, become a page of their own: property by property, side by side."""

CONFIGS = """\
Shows which configuration files are searched for this device, which entries they
have, and why others are not used.

With --explain it shows, for each operator and direction, which entry serves a call
on scores of ROWSxN, and why."""

ENV = """\
Shows versions, devices, paths of configuration files, and the environment variables
with their allowed values. Paste it into a bug report."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns - 2, 98))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coordroute",
        description="Differentiable top-k for routing: tune it for this device, verify it, measure it.",
        epilog=EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"coordroute {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str, examples: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    def add_device(command: argparse.ArgumentParser) -> None:
        text = "cpu, cuda or cuda:INDEX (default: the current GPU, or the CPU where there is none)"
        command.add_argument("--device", metavar="DEVICE", help=text)

    def add_json(command: argparse.ArgumentParser) -> None:
        text = "also write the result as JSON; without FILE or with '-', to stdout and nothing else there"
        command.add_argument("--json", metavar="FILE", nargs="?", const=STDOUT, help=text)

    one = add(
        "autotune",
        _autotune,
        "find and prove the fastest launch configurations for a device",
        AUTOTUNE,
        "  coordroute autotune\n"
        "  coordroute autotune --device cuda:1 --effort full\n"
        "  coordroute autotune --output my-gpu.json --json autotune.json\n"
        "  coordroute autotune --effort full --only soft_topk --dtypes bfloat16\n"
        "  coordroute autotune --effort full --shapes 700x6000,32x100000\n",
    )
    add_device(one)
    text = "quick is a matter of minutes; full tries more shapes, dtypes and candidates (default: %(default)s)"
    one.add_argument("--effort", choices=EFFORTS, default="quick", help=text)
    text = "the configuration file (default: <device>.json in COORDROUTE_CONFIG_DIR, or else in the user's cache folder)"
    one.add_argument("--output", metavar="FILE", help=text)
    one.add_argument(
        "--fresh",
        action="store_true",
        help="look at every candidate, instead of going on with an interrupted run or from what the file chose before",
    )
    text = f"tune these operators alone, of {', '.join(OPS)}; what the file has of others stays"
    one.add_argument("--only", metavar="OP,...", type=_some_of(OPS), help=text)
    text = "tune these dtypes alone, likewise, of those that the effort has"
    one.add_argument("--dtypes", metavar="DTYPE,...", type=_some_of(DTYPES), help=text)
    text = "tune what serves calls of these sizes, likewise, instead of the effort's fixed list"
    one.add_argument("--shapes", metavar="ROWSxN,...", type=_shapes, help=text)
    add_json(one)

    one = add(
        "verify",
        _verify,
        "check values and gradients against float64, ours or yours",
        VERIFY,
        "  coordroute verify\n"
        "  coordroute verify --device cpu --examples 200 --seed 7 --json verify.json\n"
        "  coordroute verify --op mypackage.ops:my_topk --kind soft_topk\n",
    )
    add_device(one)
    text = "rows drawn for each operator and dtype, beside a few dozen of each facet (default: %(default)s)"
    one.add_argument("--examples", metavar="N", type=_whole(1), default=256, help=text)
    one.add_argument("--seed", metavar="N", type=_whole(0), default=0, help="of all draws (default: %(default)s)")
    text = "a function to check instead of ours; the current directory is importable"
    one.add_argument("--op", metavar="MODULE:FUNCTION", type=_reference, help=text)
    one.add_argument("--kind", choices=KINDS, help="what --op computes")
    text = "begin nothing more after so long (default: no limit)"
    one.add_argument("--seconds", metavar="N", type=_whole(1), help=text)
    text = f"check these dtypes alone, of {', '.join(DTYPES)}"
    one.add_argument("--dtypes", metavar="DTYPE,...", type=_some_of(DTYPES), help=text)
    add_json(one)

    one = add(
        "benchmark",
        _benchmark,
        "measure our operators beside torch's and other people's",
        BENCHMARK,
        "  coordroute benchmark\n"
        "  coordroute benchmark --device cuda:0 --peers --json benchmark.json\n"
        "  coordroute benchmark --shapes 1024x8192,8x1024 --only soft_topk,softmax,copy\n",
    )
    add_device(one)
    text = "also measure other packages where they are installed (colt5-attention, entmax)"
    one.add_argument("--peers", action="store_true", help=text)
    text = "measure these shapes instead of the device's fixed list"
    one.add_argument("--shapes", metavar="ROWSxN,...", type=_shapes, help=text)
    text = f"measure these operators alone, of {', '.join(MEASURED_OPS)}"
    one.add_argument("--only", metavar="OP,...", type=_some_of(MEASURED_OPS), help=text)
    text = "how long it may take; what is not measured by then is said to be left out (default: 160 on a GPU, 60 on a CPU)"
    one.add_argument("--seconds", metavar="N", type=_whole(1), help=text)
    add_json(one)

    one = add(
        "sanitize",
        _sanitize,
        "look for invalid accesses and races with NVIDIA's compute-sanitizer",
        SANITIZE,
        "  coordroute sanitize\n"
        "  coordroute sanitize --device cuda:0 --tools memcheck,initcheck --json sanitize.json\n"
        "  coordroute sanitize --sanitizer /usr/local/cuda/bin/compute-sanitizer --seconds 600\n",
    )
    text = "cuda or cuda:INDEX (default: all GPUs of the current one's model side by side)"
    one.add_argument("--device", metavar="DEVICE", help=text)
    text = f"run these alone, of {', '.join(SANITIZERS)} (default: all)"
    one.add_argument("--tools", metavar="TOOL,...", type=_some_of(SANITIZERS), default=SANITIZERS, help=text)
    text = "how long it may take, all in all (default: %(default)s)"
    one.add_argument("--seconds", metavar="N", type=_whole(1), default=240, help=text)
    text = "the compute-sanitizer to run (default: of PATH, CUDA_HOME, or a package of NVIDIA's)"
    one.add_argument("--sanitizer", metavar="PATH", help=text)
    one.add_argument("--self-check", action="store_true", help=argparse.SUPPRESS)
    add_json(one)

    one = add(
        "exhaust",
        _exhaust,
        "time every candidate of some keys, for replay and for the report",
        "Times every candidate of 48 keys (on a CPU 12), without verifying or tuning anything.\n"
        "The search is judged by these timings: see `coordroute replay`.",
        "  coordroute exhaust --json exhaustive.json\n"
        "  torchrun --nproc-per-node=2 -m coordroute exhaust --json exhaustive.json\n"
        "  coordroute exhaust --timed between.json --served-by tuned.json --json between.json\n",
    )
    add_device(one)
    text = "samples of each candidate; replay takes half of them for the truth (default: %(default)s)"
    one.add_argument("--rounds", metavar="N", type=_whole(2), default=140, help=text)
    text = "shapes between those that are tuned: how well does the entry of another shape serve them?"
    one.add_argument("--between", action="store_true", help=text)
    text = "begin no key after N seconds, and keep those that were timed (default: all keys, however long they take)"
    one.add_argument("--seconds", metavar="N", type=_whole(1), help=text)
    text = "time nothing: take what --json FILE of an earlier run has, and say anew what serves each key"
    one.add_argument("--timed", metavar="FILE", help=text)
    text = "with --timed, the configuration file that serves, of that GPU"
    one.add_argument("--served-by", metavar="FILE", help=text)
    add_json(one)

    one = add(
        "replay",
        _replay,
        "replay the search on the recorded timings of all candidates",
        REPLAY,
        "  coordroute replay exhaustive.json\n"
        "  coordroute replay exhaustive.json --seeds 20 --json replay.json\n"
        "  coordroute replay exhaustive.json --strategies random,genetic_algorithm,LFBOTreeSearch\n",
    )
    one.add_argument("file", metavar="FILE", help="what exhaust --json FILE wrote")
    text = "how often each search is replayed for each key (default: %(default)s)"
    one.add_argument("--seeds", metavar="N", type=_whole(1), default=10, help=text)
    text = (
        "beside coordroute: coordroute-quick, exhaustive, random, and any of Kernel Tuner's and Helion's, by their own names "
        "(default: these three, and some that are fast)"
    )
    one.add_argument("--strategies", metavar="NAME,...", help=text)
    add_json(one)

    one = add(
        "report",
        _report,
        "render the JSON files of autotune, verify and benchmark",
        REPORT,
        "  coordroute report\n  coordroute report --input reports/nvidia-h100-80gb-hbm3 --output site\n",
    )
    text = "folder with autotune.json, verify.json, benchmark.json or verify-*.json (default: %(default)s)"
    one.add_argument("--input", metavar="DIR", default="report", help=text)
    one.add_argument("--output", metavar="DIR", default="report", help="folder to write to (default: %(default)s)")

    one = add(
        "configs",
        _configs,
        "which configuration serves a call, and why",
        CONFIGS,
        "  coordroute configs\n"
        "  coordroute configs --explain 1024x8192\n"
        "  coordroute configs --device cpu --explain 8x1024 --dtype bfloat16 --op soft_topk --json\n",
    )
    add_device(one)
    one.add_argument("--explain", metavar="ROWSxN", type=_shape, help="explain a call on scores of this shape, such as 1024x8192")
    one.add_argument("--dtype", choices=DTYPES, help="of that call's scores (default: float32)")
    one.add_argument("--op", choices=OPS, help="explain this operator only (default: both)")
    add_json(one)

    one = add(
        "env",
        _env,
        "versions, devices, paths and environment variables",
        ENV,
        "  coordroute env\n  coordroute env --json\n",
    )
    add_json(one)
    return parser


# --- checks before the work ------------------------------------------------------------------------------------------


def _reason(error: OSError) -> str:
    return error.strerror or _one_line(error)


def _check_folder(argument: str, given: str, folder: Path) -> None:
    """Makes a folder if need be and tries to write there, so that long work does not end in a file that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise Problem(f"{argument} is {given!r}, but {str(folder)!r} is a file; a folder is needed there") from error
    except (OSError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else _one_line(error)
        raise Problem(f"{argument} is {given!r}, but {str(folder)!r} cannot be written to ({reason})") from error


def _check_file(argument: str, given: str) -> Path:
    """A path to write to.

    Raises:
        Problem: it is empty, a folder, or cannot be written.
    """
    if not given.strip():
        raise Problem(f"{argument} is {given!r}; allowed is the path of a file")
    path = Path(given).expanduser()
    _check_folder(argument, given, path.parent)
    if path.is_dir():
        raise Problem(f"{argument} is {given!r}, which is a folder; allowed is the path of a file")
    return path


def _check_json(arguments: argparse.Namespace) -> None:
    if arguments.json not in (None, STDOUT):
        _check_file("--json", arguments.json)


def _check_environment() -> None:
    from .autotune import store

    try:
        store.check_environment()
    except ValueError as error:
        raise Problem(f"environment variable {error}") from error


def _device(given: str | None) -> torch.device:
    from .autotune import device as devices

    try:
        return devices.as_device(given)
    except ValueError as error:
        raise Problem(f"--{error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(data: Any) -> Any:
    """``data`` with null for numbers that JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def _finish(arguments: argparse.Namespace, data: dict[str, Any], show: Callable[[], Iterable[str]]) -> None:
    """Writes the JSON that was asked for and shows the rest."""
    if arguments.json == STDOUT:
        _emit(json.dumps(_finite(data), indent=1, allow_nan=False))
        return
    problem = None
    if arguments.json is not None:
        from .autotune import store

        text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            store.write_atomically(Path(arguments.json).expanduser(), text)
        except OSError as error:
            problem = Problem(f"--json is {arguments.json!r}, which could not be written ({_reason(error)})")
    for block in show():
        _emit(block)
    if problem is not None:
        raise problem
    if arguments.json is not None:
        _emit(f"JSON: {arguments.json}")


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """Sends to stderr what anybody writes to stdout, be it compiled code or a process that is started."""
    kept, one = None, -1
    if (sys.stdout, sys.stderr) == (sys.__stdout__, sys.__stderr__):  # else there is no file to speak of
        with contextlib.suppress(OSError, ValueError):
            one = sys.stdout.fileno()
            kept = os.dup(one)
            os.dup2(sys.stderr.fileno(), one)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, one)
            os.close(kept)


@contextlib.contextmanager
def _working(arguments: argparse.Namespace, shown: _Progress | None = None) -> Iterator[_Progress]:
    """The time of long work: progress is shown, and with ``--json -`` nothing but JSON gets to stdout."""
    with contextlib.ExitStack() as stack:
        if arguments.json == STDOUT:
            stack.enter_context(_no_stdout())
        yield stack.enter_context(_Progress(f"coordroute {arguments.command}") if shown is None else shown)


# --- autotune --------------------------------------------------------------------------------------------------------


def _config_text(config: Mapping[str, Any]) -> str:
    """A launch configuration for a person: what is 0 or null has no meaning for its variant, nor has one program a row."""
    short = {
        "rows_per_program": "rows",
        "num_warps": "warps",
        "num_stages": "stages",
        "checkpoint_segments": "segments",
        "programs_per_row": "programs",
    }
    told = {name: value for name, value in config.items() if name != "variant" and value}
    if told.get("programs_per_row") == 1:
        del told["programs_per_row"]
    parts = [f"{short.get(name, name)}={value}" for name, value in told.items()]
    return " ".join([str(config["variant"]), *parts])


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10000 else f"{value:.0f}"


def _key_text(key: Mapping[str, Any]) -> str:
    return f"{key['op']} {key['direction']} {key['dtype']} {key['rows']}x{key['n']}"


def _autotune(arguments: argparse.Namespace) -> int:
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    if arguments.output is not None:
        _check_file("--output", arguments.output)
    _check_environment()
    from .autotune import hosttime, search, store, worker
    from .kernels.config import Key

    device = _device(arguments.device)
    path = store.output_path(device) if arguments.output is None else Path(arguments.output).expanduser()
    if arguments.output is None:
        try:
            _check_file("the configuration file", str(path))
        except Problem as problem:
            raise Problem(f"{problem}; --output or COORDROUTE_CONFIG_DIR names another place") from problem
    if arguments.json not in (None, STDOUT) and Path(arguments.json).expanduser().resolve() == path.resolve():
        raise Problem(f"--json is {arguments.json!r}, which is the configuration file itself; allowed is another file")
    groups = _groups(arguments, device)
    try:
        table = _KeyTable("coordroute autotune")
        with _crew() as crew, _working(arguments, table):
            if crew is not None:
                device = _own_device(arguments, device, crew)
                if crew.rank > 0:
                    search.run(device, arguments.effort, path, arguments.fresh, groups=groups, crew=crew)
                    return OK
            evidence = search.run(
                device, arguments.effort, path, arguments.fresh, table, groups=groups, watch=table.watch, crew=crew
            )
            evidence["lookup"] = (
                hosttime.lookup(device, [Key(**key["key"]) for key in evidence["keys"]]) if evidence["keys"] else None
            )
    except KeyboardInterrupt:
        _tell("coordroute autotune", _kept(arguments, path))
        return INTERRUPTED
    except worker.WorkerError as error:
        raise Problem(_one_line(error), CHECK_FAILED) from error
    except OSError as error:
        # a full disk, a file of someone else's, a lock that another run holds: no bug of ours
        if isinstance(error, TimeoutError):
            raise Problem(f"{error}; is another `coordroute autotune` at work?") from error
        ours = error.filename is not None and Path(os.fsdecode(error.filename)).parent == path.parent
        if not ours and error.errno != errno.ENOSPC:
            raise
        raise Problem(f"{str(path)!r} cannot be written ({_reason(error)}); --output names another place") from error
    _finish(arguments, evidence, lambda: _show_autotune(evidence, device, path))
    return OK if evidence["keys"] and all(key["config"] for key in evidence["keys"]) else CHECK_FAILED


def _groups(arguments: argparse.Namespace, device: torch.device) -> list[Any]:
    """What is tuned: all of the effort or what serves the shapes of --shapes, or what --only and --dtypes leave of it."""
    from .autotune import device as devices
    from .autotune import space

    groups = space.groups(devices.backend(device), arguments.effort, arguments.shapes)
    chosen = [
        group
        for group in groups
        if group.op in (arguments.only or OPS) and (arguments.dtypes is None or group.dtype in arguments.dtypes)
    ]
    if not chosen:
        allowed = ", ".join(dict.fromkeys(group.dtype for group in groups))
        raise Problem(
            f"--dtypes is {','.join(arguments.dtypes)!r}, of which effort {arguments.effort} tunes none on {device}; allowed are"
            f" {allowed}"
        )
    return chosen


@contextlib.contextmanager
def _crew() -> Iterator[Any]:
    """The processes that torchrun started beside this one, or None."""
    from .autotune.crew import Crew, CrewError

    try:
        crew = Crew.from_environment()
    except ValueError as error:
        raise Problem(f"the environment of torchrun: {_one_line(error)}") from error
    except CrewError as error:
        raise Problem(f"the other processes of torchrun: {_one_line(error)}", CHECK_FAILED) from error
    if crew is None:
        yield None
        return
    try:
        with crew:
            yield crew
    except CrewError as error:
        raise Problem(f"the other processes of torchrun: {_one_line(error)}", CHECK_FAILED) from error


def _own_device(arguments: argparse.Namespace, device: torch.device, crew: Any) -> torch.device:
    """Under torchrun each process of a machine has a GPU of its own."""
    return _device(f"cuda:{crew.local_rank}") if arguments.device is None and device.type == "cuda" else device


def _exhaust(arguments: argparse.Namespace) -> int:
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    from .autotune import exhaust, worker

    if arguments.timed is not None or arguments.served_by is not None:
        return _served_by(arguments)
    device = _device(arguments.device)
    try:
        with _crew() as crew, _working(arguments) as progress:
            if crew is not None:
                device = _own_device(arguments, device, crew)
            rest: dict[str, Any] = {"between": arguments.between, "seconds": arguments.seconds, "crew": crew}
            if crew is not None and crew.rank > 0:
                exhaust.run(device, arguments.rounds, **rest)
                return OK
            data = exhaust.run(device, arguments.rounds, progress, **rest)
    except worker.WorkerError as error:
        raise Problem(_one_line(error), CHECK_FAILED) from error
    _finish(arguments, data, lambda: _show_exhaust(data))
    return OK if all(key["candidates"][key["default"]]["status"] == "timed" for key in data["keys"]) else CHECK_FAILED


def _served_by(arguments: argparse.Namespace) -> int:
    from .autotune import exhaust, store
    from .reports import evidence

    if arguments.timed is None or arguments.served_by is None:
        raise Problem("--timed and --served-by belong together: timings of an earlier run, and the configuration file that serves")
    try:
        timed = evidence.read_file(Path(arguments.timed), "exhaustive")
        data = exhaust.served_by(timed, store.read(Path(arguments.served_by)))
    except FileNotFoundError as error:
        raise Problem(f"there is no file {error.filename}") from error
    except store.InvalidFile as error:
        raise Problem(f"{arguments.served_by} is no configuration file: {_one_line(error)}") from error
    except ValueError as error:
        raise Problem(_one_line(error)) from error
    _finish(arguments, data, lambda: _show_exhaust(data))
    return OK


def _show_exhaust(data: Mapping[str, Any]) -> Iterator[str]:
    from .reports.candidates import quantile

    rows = []
    for key in data["keys"]:
        found = [one for one in key["candidates"] if one["status"] == "timed" and one["samples"] is not None]
        times = {id(one): statistics.median(one["samples"]) for one in found}
        default = key["candidates"][key["default"]]
        best = min(found, key=lambda one: times[id(one)], default=None)
        serves = default if key["serves"] is None else key["candidates"][key["serves"]]
        serves = serves if serves["same_as"] is None else key["candidates"][serves["same_as"]]

        def over_best(one: Mapping[str, Any], best: Any = best, times: Mapping[int, float] = times) -> str:
            return f"{times[id(one)] / times[id(best)]:.3f}x" if best is not None and id(one) in times else "-"

        dropped = Counter(one["status"] for one in key["candidates"] if one["status"] != "timed")
        rows.append(
            (
                _key_text(key["key"]),
                str(len(key["candidates"])),
                ", ".join(f"{count} {status}" for status, count in sorted(dropped.items())) or "-",
                _us(times.get(id(default))),
                _us(times[id(best)] if best is not None else None),
                over_best(default),
                "-" if key["serves"] is None else over_best(serves),
                _config_text(best["config"]) if best is not None else "-",
            )
        )
    columns = [("key", "left"), ("candidates", "right"), ("dropped", "left"), ("default µs", "right"), ("best µs", "right")]
    columns += [("default ÷ best", "right"), ("serving ÷ best", "right"), ("best", "fold")]
    yield _table(f"all candidates, {data['device']['name']}, {data['rounds']} rounds", columns, rows)
    if data["left_out"]:
        yield f"{_count(data['left_out'], 'key')} left out: no time was left."
    served = [float(row[6][:-1]) for row in rows if row[6] != "-"]
    if served:
        yield (
            f"What serves such calls takes {statistics.median(served):.3f}x the time of the best at the median,"
            f" {quantile(served, 0.95):.3f}x at p95, {max(served):.3f}x at worst."
        )


def _kept(arguments: argparse.Namespace, path: Path) -> str:
    """What an interrupted search left behind, and the command that goes on from there."""
    from .autotune import journal

    where = journal.journal_path(path)
    counts: Counter[str] = Counter()
    with contextlib.suppress(OSError, ValueError):
        counts.update(json.loads(line)[0] for line in where.read_text(encoding="utf-8").splitlines()[1:] if line.endswith("]"))
    tuned = f"{_count(2 * counts['group'], 'tuned key')} (in {path}) and " if counts["group"] else ""
    measured = counts["samples"] + counts["final"] + counts["proved"]
    kept = f"kept {tuned}{_count(measured, 'measurement')} (in {where})" if measured else "nothing was measured yet"
    words = ["coordroute", "autotune"]
    if arguments.device is not None:
        words += ["--device", arguments.device]
    if arguments.effort != "quick":
        words += ["--effort", arguments.effort]
    for option in ("only", "dtypes"):
        if getattr(arguments, option) is not None:
            words += [f"--{option}", ",".join(getattr(arguments, option))]
    if arguments.shapes is not None:
        words += ["--shapes", ",".join(f"{rows}x{n}" for rows, n in arguments.shapes)]
    if arguments.output is not None:
        words += ["--output", arguments.output]
    if arguments.json is not None:
        words += ["--json", arguments.json]
    again = "run it again without --fresh" if arguments.fresh else "the same command goes on from there"
    return f"interrupted; {kept}; {again}: {shlex.join(words)}"


def _show_autotune(evidence: dict[str, Any], device: torch.device, path: Path) -> Iterator[str]:
    from .autotune import store

    keys = evidence["keys"]
    columns = [
        ("direction", "left"),
        ("dtype", "left"),
        ("rows x n", "right"),
        ("default us", "right"),
        ("tuned us", "right"),
        ("gain", "right"),
        ("configuration", "fold"),
    ]
    yield f"{evidence['device']['name']}, effort {evidence['effort']}, {_duration(evidence['seconds'])}"
    for op in OPS:
        rows: list[list[Cell]] = []
        for key in keys:
            one, timing = key["key"], key["timing"]
            if one["op"] != op:
                continue
            row: list[Cell] = [one["direction"], one["dtype"], f"{one['rows']}x{one['n']}"]
            if timing is None:
                row += ["-", "-", "-", ("none: the default failed, see below", "red")]
            else:
                gain = key["gain"]
                faster = f"{gain:.2f}x"
                row += [
                    _us(timing["default_us"]),
                    _us(timing["median_us"]),
                    (faster, "green") if gain > 1 else faster,
                    _config_text(key["config"]),
                ]
            rows.append(row)
        if rows:
            yield _table(f"\n{op}", columns, rows)
    mean = evidence["geometric_mean_gain"]
    if mean is not None:
        stays = sum(1 for key in keys if key["gain"] == 1.0)
        yield f"\nGain over the default: {mean:.2f}x in the geometric mean of {len(keys)} keys; the default stays for {stays}."
    if evidence["resumed"]:
        yield f"Of these keys {evidence['resumed']} are from the interrupted run before."
    if evidence["reverified"]:
        again = _count(2 * evidence["reverified"], "key", "keys")
        since = " and ".join(f"another {cause}" for cause in evidence["outdated"])
        yield f"What {again} had was made with {since}: it was proved and timed anew, not searched; --fresh searches it too."
    if evidence["kept"]:
        kept = _count(2 * evidence["kept"], "other entry", "other entries")
        yield f"The proofs of {kept} hold, and they are as they were; --fresh searches them too."
    yield from _show_dropped(evidence)
    tuned = sum(1 for key in keys if key["config"])
    if not tuned:
        yield f"Nothing was tuned, and {path} has no new entry."
        return
    yield f"Wrote {_count(tuned, 'entry', 'entries')}: {path}"
    if not store.tuned_allowed():
        yield "It is not used while COORDROUTE_TUNED=0."
    elif all(verdict.path.resolve() != path.resolve() for verdict in store.files(device)):
        wanted = store.output_path(device)
        yield f"Lookups do not search there. Move it to {wanted}, or name it {wanted.name} in a folder of COORDROUTE_CONFIG_DIR."
    first = next(key["key"] for key in keys if key["config"])
    yield (
        f"What serves a call: coordroute configs --device {device} --explain {first['rows']}x{first['n']} --dtype {first['dtype']}"
    )


def _show_dropped(evidence: dict[str, Any]) -> Iterator[str]:
    """What was dropped: how often, and an example with its reason."""
    if not evidence["dropped"]:
        yield "No candidate was dropped."
        return
    yield "Dropped:"
    for status, count in sorted(evidence["dropped"].items()):
        example = next(
            (
                f"; e.g. {_key_text(key['key'])}, {_config_text(one['config'])}: {one['reason'] or 'no reason given'}"
                for key in evidence["keys"]
                for one in key["candidates"]
                if one["status"] == status
            ),
            "",
        )
        what = f"{count} {status}" if status.startswith("keys ") else f"{count} x {status}"
        yield f"  {what}{_one_line(example)}"


# --- verify ----------------------------------------------------------------------------------------------------------


def _imported(reference: str) -> Callable[..., Any]:
    """The function of ``MODULE:FUNCTION``. Whatever a stranger's module raises is a message."""
    module_name, _, attribute = reference.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inner = frames[-1].filename
        where = "" if "importlib" in inner else f" ({inner}, line {frames[-1].lineno})"
        cause = f"{type(error).__name__}: {_one_line(error)}".removesuffix(": ")
        raise Problem(f"--op is {reference!r}, but module {module_name!r} does not import: {cause}{where}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise Problem(f"--op is {reference!r}, but module {module_name!r} has no {attribute!r}") from error
    if not callable(found):
        raise Problem(f"--op is {reference!r}, which is a {type(found).__name__}; a function is needed")
    return found


def _distribution(reference: str) -> str | None:
    """The distribution behind ``MODULE:FUNCTION`` and its version, such as "entmax 1.3"; None for what was not installed.

    A module of adapters says by a table ``DISTRIBUTIONS``, function -> distribution, for what they stand.
    """
    module, _, function = reference.partition(":")
    said = getattr(sys.modules.get(module), "DISTRIBUTIONS", {}).get(function)
    package = module.partition(".")[0]
    if said is None and package == "coordroute":
        return f"coordroute {__version__}"
    for name in [said] if said is not None else metadata.packages_distributions().get(package, []):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return None


def _verify(arguments: argparse.Namespace) -> int:
    if (arguments.op is None) != (arguments.kind is None):
        given, missing = ("--op", "--kind") if arguments.kind is None else ("--kind", "--op")
        wanted = f"one of {', '.join(KINDS)}" if missing == "--kind" else "MODULE:FUNCTION"
        raise Problem(f"{given} is given without {missing}; allowed is both or neither ({missing} is {wanted})")
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    _check_environment()
    from .autotune import device as devices
    from .reference import verify

    device = _device(arguments.device)
    with _working(arguments) as progress:
        if arguments.op is None:
            from .router import coordinate_descent, soft_topk

            targets: dict[str, Callable[..., Any]] = {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent}
            where = {op: f"coordroute:{op}" for op in OPS}
            variants = "coordroute.autotune.variants:variants"
        else:
            targets = {arguments.kind: _imported(arguments.op)}
            where, variants = {arguments.kind: arguments.op}, None
        found = verify.run(
            targets,
            device=device,
            examples=arguments.examples,
            seed=arguments.seed,
            progress=progress,
            dtypes=arguments.dtypes or verify.DTYPES,
            seconds=arguments.seconds,
            where=where,
            variants=variants,
        )
    evidence = {
        "schema": 1,
        "command": "verify",
        "device": devices.describe(device),
        "versions": devices.versions(),
        "date": _now(),
        "target": arguments.op or "coordroute",
        "target_version": _distribution(arguments.op or "coordroute:soft_topk"),
        **found,
    }
    _finish(arguments, evidence, lambda: _show_verify(evidence))
    return OK if evidence["ok"] else CHECK_FAILED


def _show_verify(evidence: dict[str, Any]) -> Iterator[str]:
    rows = evidence["properties"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    yield f"{evidence['target']} on {evidence['device']['name']}, seed {evidence['seed']}, {evidence['examples']} examples"
    yield "A cell is the worst row: how much of the error that is allowed it has. Rows are those compared, in all dtypes."
    for op in dict.fromkeys(row["op"] for row in rows):
        columns = [("property", "left"), *((dtype, "right") for dtype in dtypes), ("rows", "right"), ("left out", "right")]
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if row["op"] == op:
                found.setdefault(row["property"], {})[row["dtype"]] = row
        shown: list[list[Cell]] = []
        for name, of in found.items():
            compared, left_out = sum(row["cases"] for row in of.values()), sum(row["left_out"] for row in of.values())
            share = f"{left_out / (left_out + compared):.2%}" if left_out else "-"
            shown.append([name, *(_verdict_cell(of.get(dtype)) for dtype in dtypes), str(compared), share])
        yield _table(f"\n{op}", columns, shown)
        yield from _show_facets([row for row in evidence["facets"] if row["op"] == op])
    told = {(failure["op"], failure["property"], failure["dtype"]) for failure in evidence["failures"]}
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] != "pass" and (row["op"], row["property"], row["dtype"]) not in told:
            what = (row["verdict"], row["op"], row["property"], _one_line(row["reason"] or "no reason given"))
            reasons.setdefault(what, []).append(row["dtype"])
    if reasons:
        yield ""
    for (verdict, op, name, reason), some in reasons.items():
        yield f"{verdict}: {op}, {name} ({', '.join(some)}): {reason}"
    shown_code: set[tuple[str, str]] = set()
    for failure in evidence["failures"]:
        yield f"\nFAILED: {failure['message']}"
        # other dtypes of the same failure are in the JSON
        if failure["reproducer"] and (failure["op"], failure["property"]) not in shown_code:
            shown_code.add((failure["op"], failure["property"]))
            yield f"This code reproduces it:\n\n{failure['reproducer']}"
    verdicts = Counter(row["verdict"] for row in rows)
    summary = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("pass", "fail", "not run") if verdicts[verdict])
    whole = "All hold" if evidence["ok"] else "Not all hold"
    yield f"\n{whole}: {summary or 'nothing was checked'} ({_duration(evidence['seconds'])})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _verdict_cell(row: dict[str, Any] | None) -> Cell:
    if row is None or row["verdict"] == "not run":
        return ("-", "dim")
    if row["verdict"] == "fail":
        return ("FAILS", "bold red")
    ratio = row["worst_ratio"]
    return ("exact" if not ratio else f"{ratio:.2g}", "green")


def _show_facets(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What fails on which kind of input, and what was not run."""
    failing: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name in row["failed"]:
            failing.setdefault(row["facet"], {}).setdefault(name, []).append(row["dtype"])
    if failing:
        every = list(dict.fromkeys(row["dtype"] for row in rows))
        lines: list[list[Cell]] = []
        for facet, of in failing.items():
            parts = [name if dtypes == every else f"{name} ({', '.join(dtypes)})" for name, dtypes in of.items()]
            lines.append([facet, "; ".join(parts)])
        yield _table("fails on", [("facet", "left"), ("properties", "fold")], lines)
    reasons = {(row["facet"], row["reason"], row["verdict"]) for row in rows if row["reason"] and row["verdict"] != "fail"}
    for facet, reason, verdict in sorted(reasons):
        yield f"{verdict if verdict == 'not run' else 'cut short'}: {facet}: {_one_line(reason)}"


# --- benchmark -------------------------------------------------------------------------------------------------------


def _benchmark(arguments: argparse.Namespace) -> int:
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    _check_environment()
    from .autotune import benchmark

    device = _device(arguments.device)
    with _working(arguments) as progress:
        evidence = benchmark.run(
            device, arguments.peers, progress, shapes=arguments.shapes, only=arguments.only, seconds=arguments.seconds
        )
    _finish(arguments, evidence, lambda: _show_benchmark(evidence))
    return OK


def _show_benchmark(evidence: dict[str, Any]) -> Iterator[str]:
    columns = [("operator", "left"), ("implementation", "fold")]
    for direction in ("forward", "backward"):
        columns += [(f"{direction} us", "right"), ("x softmax", "right")]
    yield f"{evidence['device']['name']}, {_duration(evidence['seconds'])}. {evidence['method']}."
    tables: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in evidence["results"]:
        tables.setdefault((row["rows"], row["n"], row["dtype"]), []).append(row)
    for (rows, n, dtype), found in tables.items():
        cells = {(row["op"], row["implementation"], row["direction"]): row for row in found}
        if all(row["median_us"] is None for row in found):
            continue
        shown: list[list[Cell]] = []
        for op, name in dict.fromkeys((row["op"], row["implementation"]) for row in found):
            line: list[Cell] = [op, name]
            for direction in ("forward", "backward"):
                row = cells.get((op, name, direction))
                softmax = cells.get(("softmax", "torch.softmax", direction), {}).get("median_us")
                if row is None:
                    line += ["", ""]
                elif row["median_us"] is None:
                    line += [("skipped", "yellow"), ""]
                else:
                    line += [_us(row["median_us"]), f"{row['median_us'] / softmax:.2f}" if softmax else "-"]
            shown.append(line)
        yield _table(f"\n{rows}x{n} {dtype}", columns, shown)
    yield from _show_skipped([row for row in evidence["results"] if row["median_us"] is None])
    yield from _show_targets(evidence.get("targets", []))


def _show_skipped(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was not measured: one line for each reason."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        reasons.setdefault(_one_line(row["status"].removeprefix("skipped: ")), []).append(row)
    if reasons:
        yield "\nSkipped:"
    for reason, found in reasons.items():
        names = list(dict.fromkeys(f"{row['op']} by {row['implementation']}" for row in found))
        who = names[0] if len(names) == 1 else f"{len(names)} implementations"
        first = found[0]
        place = f"{first['rows']}x{first['n']} {first['dtype']} {first['direction']}"
        yield f"  {who}: {reason} ({place if len(found) == 1 else f'{len(found)} times, first {place}'})"


def _target_figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    figure = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{figure}x" if unit == "×" else f"{figure} {unit}"


def _target_verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """A word for what became of a target, and its style."""
    if row["met"] is not None:
        return ("met", "green") if row["met"] else ("missed", "bold red")
    return ("not measured", "yellow") if row["figure"] is None else ("no limit", "")


def _place(row: Mapping[str, Any]) -> str:
    return "" if row["rows"] is None else f"{row['rows']}x{row['n']}"


def _show_targets(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The targets, and a line for each reason for which one was not measured."""
    if not rows:
        return
    columns = [
        ("", "left"),
        ("work", "left"),
        ("rows x n", "right"),
        ("target", "fold"),
        ("float32", "right"),
        ("bfloat16", "right"),
        ("verdict", "left"),
    ]
    shown: list[list[Cell]] = []
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["figure"] is None:
            reasons.setdefault(_one_line(row["reason"]), []).append(row)
        if not row["applies"]:
            continue
        figures = [_target_figure(row[name], row["unit"]) for name in ("figure", "bfloat16")]
        if row["detail"].get("sweeps"):
            figures[0] += f" ({_count(row['detail']['sweeps'], 'sweep')})"
        shown.append([row["id"], row["work"], _place(row), row["target"], *figures, _target_verdict(row)])
    yield _table("\nTargets", columns, shown)
    if reasons:
        yield "\nTargets that were not measured:"
    for reason, found in reasons.items():
        several = Counter(row["id"] for row in rows)
        here = Counter(row["id"] for row in found)
        whole = [name for name in here if here[name] == several[name]]
        parts = [f"{row['id']} {_place(row)}" for row in found if row["id"] not in whole]
        yield f"  {', '.join([*whole, *parts])}: {reason}"
    judged = [row["met"] for row in rows if row["met"] is not None]
    others = len(rows) - len(judged)
    yield f"\nTargets: {sum(judged)} met, {len(judged) - sum(judged)} missed, {others} not measured or without a limit"


# --- sanitize --------------------------------------------------------------------------------------------------------


def _sanitize(arguments: argparse.Namespace) -> int:
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    _check_environment()
    from .autotune import device as devices
    from .autotune import sanitize

    try:
        sanitizer = sanitize.find(arguments.sanitizer)
    except sanitize.NotFound as error:
        raise Problem(_one_line(error)) from error
    device = _device(arguments.device)
    if device.type != "cuda":
        what = "there is no GPU here" if arguments.device is None else f"--device is {arguments.device!r}"
        raise Problem(f"{what}; compute-sanitizer looks at kernels on NVIDIA GPUs: cuda or cuda:INDEX")
    gpus = devices.alike(device) if arguments.device is None else ()
    with _working(arguments) as progress:
        evidence = sanitize.run(device, sanitizer, arguments.tools, arguments.seconds, progress, arguments.self_check, gpus)
    _finish(arguments, evidence, lambda: _show_sanitize(evidence))
    return OK if evidence["ok"] else CHECK_FAILED


def _show_sanitize(evidence: dict[str, Any]) -> Iterator[str]:
    version = evidence["versions"]["compute-sanitizer"]
    yield f"{evidence['device']['name']}, compute-sanitizer {version}, {_duration(evidence['seconds'])}"
    columns = [("tool", "left"), ("launches of", "left"), ("checked", "right"), ("errors", "right"), ("verdict", "left")]
    styles = {"clean": "green", "errors": "bold red", "not finished": "yellow"}
    shown: list[list[Cell]] = []
    for tool in evidence["tools"]:
        seen = tool["sees_planted_fault"]
        shown.append([tool["tool"], "a planted fault", "", "", ("seen", "green") if seen else ("not seen", "bold red")])
        for group in tool["groups"]:
            counts = f"{group['launches']} of {group['planned']}"
            verdict = group["verdict"] if seen else "not finished"
            shown.append([tool["tool"], group["group"], counts, str(group["errors"]), (verdict, styles[verdict])])
    yield _table("", columns, shown)
    for tool in evidence["tools"]:
        reasons = [f"{group['group']}: {group['reason']}" for group in tool["groups"] if group["reason"]]
        for reason in reasons if tool["sees_planted_fault"] else [tool["reason"]]:
            yield f"{tool['tool']}: {_one_line(reason)}"
        for report in tool["reports"]:
            yield f"\n{tool['tool']}, {report['group']}:\n{report['text']}"
        if tool["cases"]:
            yield f"{tool['tool']} has errors at\n" + "\n".join(f"  {case}" for case in tool["cases"])
    verdicts = Counter(tool["verdict"] for tool in evidence["tools"])
    if not evidence["self_check"]:
        yield "\n" + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


# --- replay ----------------------------------------------------------------------------------------------------------


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.json != STDOUT:
        _need_rich()
    _check_json(arguments)
    path = Path(arguments.file).expanduser()
    if arguments.json not in (None, STDOUT) and Path(arguments.json).expanduser().resolve() == path.resolve():
        raise Problem(f"--json is {arguments.json!r}, which is FILE itself; allowed is another file")
    from .autotune import replay

    names = None
    if arguments.strategies is not None:
        names = tuple(part.strip() for part in arguments.strategies.split(","))
    try:
        names = replay.chosen_strategies(names)
    except ValueError as error:
        raise Problem(f"--{error}") from error
    try:
        recording = replay.read(path)
    except ValueError as error:
        raise Problem(f"FILE is {arguments.file!r}: {_one_line(error)}") from error
    with _working(arguments) as progress:
        found = replay.run(recording, arguments.seeds, names, progress)
    _finish(arguments, found, lambda: _show_replay(found))
    return OK


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def _show_replay(found: dict[str, Any]) -> Iterator[str]:
    from .reports.candidates import goals

    ours, rounds = found["strategies"][0], found["rounds"]
    keys = _count(len(ours["keys"]), "key")
    yield f"{found['device']['name']}, {found['source']}: {keys}, {_count(found['seeds'], 'seed')}"
    columns = [("strategy", "left"), ("regret: median", "right"), ("p95", "right"), ("worst", "right")]
    columns += [("launches: median", "right"), ("worst", "right"), ("stable keys", "right")]
    rows: list[list[Cell]] = []
    for one in found["strategies"]:
        figures = [
            *(one["regret"][name] for name in ("median", "p95", "worst")),
            *(one["share"][name] for name in ("median", "worst")),
        ]
        rows.append(
            [one["name"], *map(_percent, figures), f"{sum(key['agreement'] == 1 for key in one['keys'])} of {len(one['keys'])}"]
        )
    yield _table("", columns, rows)
    for one in found["failed"]:
        yield f"{one['name']} is left out: {_one_line(one['reason'])}"
    for one in found["left_out"]:
        yield f"{_key_text(one['key'])} is left out: {one['reason']}"
    yield f"Launches are a share of {found['full_launches']}."
    if ours["most_rounds"] > rounds["searched"]:
        asked = f"A search could draw from {_count(rounds['searched'], 'round')}, and ours asked for up to {ours['most_rounds']}"
        yield f"{asked}: it saw some again, so that its choices agree more than they would on a device."
    verdicts = goals(ours)
    shown: list[list[Cell]] = []
    for goal in verdicts:
        limit = f"at {'least' if goal.at_least else 'most'} {_percent(goal.limit)}"
        verdict = ("met", "green") if goal.met else ("missed", "bold red")
        shown.append([goal.name, limit, _percent(goal.figure), verdict, goal.more])
    columns = [("goal", "fold"), ("limit", "right"), ("figure", "right"), ("verdict", "left"), ("", "fold")]
    yield _table(f"\nGoals of {ours['name']}", columns, shown)
    met = sum(goal.met for goal in verdicts)
    yield f"\nGoals: {met} met, {len(verdicts) - met} missed"


# --- report ----------------------------------------------------------------------------------------------------------


def _report(arguments: argparse.Namespace) -> int:
    folder, output = Path(arguments.input).expanduser(), Path(arguments.output).expanduser()
    from .reports import evidence, render

    try:
        evidence.load(folder)
    except ValueError as error:
        raise Problem(f"--input is {arguments.input!r}: {_one_line(error)}") from error
    _check_folder("--output", arguments.output, output)
    written = render.render(folder, output)
    for path in written:
        _emit(str(path))
    return OK


# --- configs ---------------------------------------------------------------------------------------------------------


def _configs(arguments: argparse.Namespace) -> int:
    if arguments.explain is None:
        for name in ("dtype", "op"):
            if getattr(arguments, name) is not None:
                raise Problem(f"--{name} is given without --explain; it says which call to explain: --explain ROWSxN")
    _check_json(arguments)
    _check_environment()
    from .autotune import device as devices
    from .autotune import store

    device = _device(arguments.device)
    verdicts = store.files(device)
    found = {verdict.path: store.read(verdict.path) for verdict in verdicts if verdict.entries}
    backend, today, versions = devices.backend(device), devices.describe(device), devices.versions()
    outdated = {
        path: Counter(
            " and ".join(one.since) for key, one in store.outdated(path, backend, today, versions).items() if key in file.entries
        )
        for path, file in found.items()
    }
    explained: list[Explanation] = []
    if arguments.explain is not None:
        dtype = arguments.dtype or "float32"
        for op in [arguments.op] if arguments.op else OPS:
            explained += [store.explain(device, op, direction, dtype, *arguments.explain) for direction in ("forward", "backward")]
    data: dict[str, Any] = {
        "schema": 1,
        "command": "configs",
        "device": today,
        "versions": versions,
        "date": _now(),
        "tuned_allowed": store.tuned_allowed(),
        "autotune_writes": str(store.output_path(device)),
        "files": [
            asdict(verdict)
            | {"path": str(verdict.path)}
            | {"used_entries": list(found[verdict.path].entries.values()) if verdict.path in found else []}
            | {"outdated": dict(outdated.get(verdict.path, {}))}
            for verdict in verdicts
        ],
        "explained": [one.to_json() for one in explained],
    }

    def show() -> Iterator[str]:
        if explained:
            for position, one in enumerate(explained):
                yield from [""] if position else []
                yield from _show_explanation(one)
            return
        yield f"{data['device']['name']} ({device})"
        yield from _show_verdicts(verdicts, outdated, store.output_path(device))
        for path, file in found.items():
            yield f"\nEntries of {path}:"
            rows = [("operator", "direction", "dtype", "rows x n", "median us", "gain", "configuration")]
            for key, entry in sorted(file.entries.items()):
                timing = entry["timing"]
                gain = f"{timing['default_us'] / timing['median_us']:.2f}x" if timing["median_us"] else "-"
                shape, config = f"{key.rows}x{key.n}", _config_text(entry["config"])
                rows.append((key.op, key.direction, key.dtype, shape, _us(timing["median_us"]), gain, config))
            yield "\n".join(_columns(rows))
        yield f"\nWhich entry serves a call, and why: coordroute configs --device {device} --explain 1024x8192 --dtype float32"

    _finish(arguments, data, show)
    return OK


def _show_verdicts(
    verdicts: Sequence[Verdict], outdated: Mapping[Path, Mapping[str, int]] | None = None, writes: Path | None = None
) -> Iterator[str]:
    """Lines on the files of a search, with how many used entries were made with other versions, and which file autotune writes."""
    if not verdicts:
        yield "COORDROUTE_TUNED=0: no file is read and the heuristic serves everywhere."
        return
    yield "Files in the order of the search; an entry of an earlier one wins, and where none fits the heuristic serves:"
    for position, verdict in enumerate(verdicts, 1):
        yield f"  {position}. {verdict.source}: {verdict.path}"
        entries = f" ({_count(verdict.entries, 'entry', 'entries')})" if verdict.entries else ""
        reason = f": {_one_line(verdict.reason)}" if verdict.reason and not verdict.rejected else ""
        yield f"     {verdict.verdict}{entries}{reason}"
        for why, count in verdict.rejected.items():
            yield f"     {count} not used: {_one_line(why)}"
        for since, count in (outdated or {}).get(verdict.path, {}).items():
            again = "; `coordroute autotune` proves what it chose anew" if verdict.path == writes else ""
            yield f"     {count} used, but proved and timed with another {since}{again}"
    if not any(verdict.entries for verdict in verdicts):
        yield "No file serves this device; `coordroute autotune` makes one."


def _show_explanation(one: Explanation) -> Iterator[str]:
    key = one.key
    yield f"{key.op} {key.direction} on {one.rows}x{one.n} {key.dtype} (bucket {key.rows}x{key.n}), {one.device}"
    rows = [("served by", f"{one.source}{f': {one.path}' if one.path else ''}"), ("why", _one_line(one.why))]
    rows.append(("config", _config_text(one.config.to_json())))
    if one.entry is not None:
        timing, proof = one.entry["timing"], one.entry["proof"]
        low, high = (_us(value) for value in timing["ci_us"])
        gain = f", {timing['default_us'] / timing['median_us']:.2f}x" if timing["median_us"] else ""
        rows.append(
            ("timing", f"{_us(timing['median_us'])} us ({low} to {high}), the default {_us(timing['default_us'])} us{gain}")
        )
        bound = proof["bound"]
        errors = ", ".join(
            f"{name} {_figure(error)} of {_figure(bound[name] if isinstance(bound, dict) else bound)}"
            for name, error in proof["max_error"].items()
            if error is not None
        )
        rows.append(("proof", f"{proof['cases']} rows of {len(proof['families'])} families, replays bitwise, seed {proof['seed']}"))
        rows.append(("worst error", f"{errors or '-'} allowed"))
        rows.append(("heuristic", _config_text(one.heuristic.to_json())))
    yield "\n".join(_columns(rows))


# --- env -------------------------------------------------------------------------------------------------------------


OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS")
"""Not ours, but they explain many a surprise."""


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _env(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    import torch

    from .autotune import device as devices
    from .autotune import store

    default = devices.default_device()
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    problem, verdicts, output = None, [], None
    try:
        store.check_environment()
        verdicts, output = store.files(default), store.output_path(default)
    except ValueError as error:
        # a bug report must show what is wrong; so all the rest is shown all the same
        problem = Problem(f"environment variable {error}")
    unknown = sorted(name for name in os.environ if name.startswith("COORDROUTE_") and name not in store.ENVIRONMENT)
    data: dict[str, Any] = {
        "schema": 1,
        "command": "env",
        "date": _now(),
        "versions": devices.versions() | {name: _installed(name) for name in ("numpy", "einops", *EXTRA_MODULES)},
        "package": str(Path(__file__).resolve().parent),
        "executable": sys.executable,
        "platform": platform.platform(),
        "default_device": str(default),
        "devices": {name: devices.describe(name) for name in here},
        "autotune_writes": str(output) if output else None,
        "files": [asdict(verdict) | {"path": str(verdict.path)} for verdict in verdicts],
        "environment": [asdict(one) | {"value": os.environ.get(one.name)} for one in store.ENVIRONMENT.values()],
        "unknown_variables": unknown,
        "other_variables": {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ},
        "problem": str(problem) if problem else None,
    }
    _finish(arguments, data, lambda: _show_env(data, verdicts))
    for name in unknown:
        allowed = ", ".join(store.ENVIRONMENT)
        _tell("coordroute env", f"warning: environment variable {name} is none of coordroute's; those are {allowed}")
    if problem is not None:
        raise problem
    return OK


def _show_env(data: dict[str, Any], verdicts: Sequence[Verdict]) -> Iterator[str]:
    versions = [(name, version or "not installed") for name, version in data["versions"].items() if name != "cuda"]
    versions.insert(3, ("cuda", data["versions"]["cuda"] or "torch is built without it"))
    places = [(name, data[name]) for name in ("package", "executable", "platform")]
    yield "\n".join(["Versions", *_columns([*versions, *places])])
    for name, device in data["devices"].items():
        default = " (default)" if name == data["default_device"] else ""
        facts = [
            ("name", device["name"]),
            ("cores" if name == "cpu" else "multiprocessors", str(device["sm_count"])),
            ("capability", device["capability"]),
            ("memory", f"{device['memory_bytes'] / 2**30:.1f} GiB"),
            ("system" if name == "cpu" else "driver", device["driver"]),
        ]
        yield "\n".join([f"\nDevice {name}{default}", *_columns(facts)])
    if data["problem"] is None:
        yield f"\nConfigurations of {data['default_device']}"
        yield from _show_verdicts(verdicts)
        yield f"`coordroute autotune` writes {data['autotune_writes']}"
    yield "\nEnvironment variables"
    for one in data["environment"]:
        value = "is not set" if one["value"] is None else f"= {one['value']!r}"
        facts = [("meaning", one["meaning"]), ("allowed", one["allowed"]), ("default", one["default"])]
        yield "\n".join([f"  {one['name']} {value}", *_columns(facts, indent=4)])
    for name, value in data["other_variables"].items():
        yield f"  {name} = {value!r} (not coordroute's)"


# --- main ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 fine, 1 a check failed, 2 bad usage, 130 interrupted.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        SystemExit: after ``--help`` and ``--version``.
    """
    prog = "coordroute"
    try:
        parser = _parser()
        arguments, unknown = parser.parse_known_args(argv)
        if arguments.command is not None:
            prog = f"coordroute {arguments.command}"
        if unknown:
            raise Problem(f"unknown argument {shlex.join(unknown)} (see {prog} --help)")
        if arguments.command is None:
            parser.print_help()
            return OK
        with _readable_warnings(prog):
            run: Callable[[argparse.Namespace], int] = arguments.run
            return run(arguments)
    except Problem as problem:
        _tell(problem.prog or prog, f"error: {problem}")
        return problem.status
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_MODULES:
            raise
        _tell(prog, f"error: it needs the package {error.name}, which is not installed: {EXTRA}")
        return BAD_USAGE
    except KeyboardInterrupt:
        _tell(prog, "interrupted; no result was written")
        return INTERRUPTED
