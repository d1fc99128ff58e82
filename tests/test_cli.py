"""The command line: what it prints and returns, that errors are one readable line, and that Ctrl-C loses nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from coordroute import cli, coordinate_descent, soft_topk
from coordroute.autotune import benchmark, crew, journal, sanitize, search, space, store, targets, worker
from coordroute.autotune import device as devices
from coordroute.autotune.fingerprint import kernel_sha256
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig
from coordroute.reference import others, verify

CPU = torch.device("cpu")
COMMANDS = ("autotune", "verify", "benchmark", "sanitize", "exhaust", "replay", "report", "configs", "env")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Nothing of the user's is read, and nothing outside of tmp_path is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("COORDROUTE_CONFIG_DIR", "COORDROUTE_TUNED", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    store.reload()
    yield
    store.reload()


@pytest.fixture
def run(capsys):
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(one) for one in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def command(*argv: object, code: str | None = None) -> list[str]:
    """The command line of a process: ``python -m coordroute``, or a program that ends by calling main."""
    begin = (
        ["-m", "coordroute"] if code is None else ["-c", f"{code}; import sys; from coordroute.cli import main; sys.exit(main())"]
    )
    return [sys.executable, *begin, *map(str, argv)]


def process(*argv: object, code: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*argv, code=code), capture_output=True, text=True, timeout=240, env=dict(os.environ) | environment
    )


def one_line_error(said: tuple[int, str, str], prog: str, *parts: str) -> None:
    """Status 2, nothing on stdout, and one line on stderr that has all the parts."""
    status, out, err = said
    assert (status, out) == (2, ""), said
    assert err.count("\n") == 1 and err.startswith(f"{prog}: error: "), err
    for part in parts:
        assert part in err, (part, err)


# --- help ------------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_modules_that_are_imported_late():
    assert cli.OPS == kernel_config.OPS and cli.KINDS == verify.KINDS
    assert kernel_config.DTYPES == cli.DTYPES and set(verify.DTYPES) == set(cli.DTYPES)
    assert sanitize.TOOLS == cli.SANITIZERS
    assert tuple(space.EFFORTS) == cli.EFFORTS
    assert cli.MEASURED_OPS == benchmark.OPS


def test_alone_it_prints_the_help_with_an_example_of_every_command(run, capsys):
    status, out, err = run()
    assert (status, err) == (0, "")
    for name in COMMANDS:
        assert f"\n  coordroute {name}" in out
    assert "  130  interrupted" in out
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_that_fits_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"examples:\n  coordroute {name}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_and_usage_errors_do_not_import_torch():
    program = (
        "import sys; from coordroute.cli import main\n"
        "try: main(['verify', '--help'])\n"
        "except SystemExit: pass\n"
        "main(['verify', '--examples', '0'])\n"
        "print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nFalse False\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "coordroute 0.1.0\n"


# --- errors that a user can cause ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["autotune", "--device", "tpu"], ["--device is 'tpu'", "'cpu'", "cuda:<index>"]),
        (["verify", "--device", "cuda:99"], ["--device is 'cuda:99'"]),
        (["benchmark", "--device", "mps"], ["--device is 'mps'", "'cpu'"]),
        (["configs", "--device", "cuda:x"], ["--device is 'cuda:x'", "'cpu'"]),
        (["autotune", "--effort", "fast"], ["--effort is 'fast'; allowed is one of", "quick", "full"]),
        (["autotune", "--only", "topk"], ["--only is", "names 'topk'", "soft_topk", "coordinate_descent"]),
        (["autotune", "--output", "."], ["--output is '.'", "is a folder", "path of a file"]),
        (["autotune", "--output", ""], ["--output is ''", "path of a file"]),
        (["autotune", "--output", "file/x.json"], ["--output is 'file/x.json'", "'file' is a file"]),
        (["autotune", "--output", "same.json", "--json", "./same.json"], ["--json is './same.json'", "configuration file itself"]),
        (["verify", "--json", "folder"], ["--json is 'folder'", "is a folder"]),
        (["env", "--json", "file/x.json"], ["--json is 'file/x.json'", "'file' is a file"]),
        (["verify", "--examples", "0"], ["--examples is '0'", "at least 1"]),
        (["verify", "--examples", "many"], ["--examples", "'many'", "at least 1"]),
        (["verify", "--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["verify", "--op", "math:sqrt"], ["--op is given without --kind", "soft_topk, coordinate_descent"]),
        (["verify", "--kind", "soft_topk"], ["--kind is given without --op", "MODULE:FUNCTION"]),
        (["verify", "--kind", "softmax", "--op", "math:sqrt"], ["--kind", "'softmax'", "coordinate_descent"]),
        (["verify", "--dtypes", "float32,int8"], ["--dtypes is 'float32,int8'", "names 'int8'", "bfloat16"]),
        (["sanitize", "--tools", "memchek"], ["--tools is 'memchek'", "memcheck", "synccheck"]),
        (["sanitize", "--seconds", "0"], ["--seconds is '0'", "at least 1"]),
        (["verify", "--op", "math.sqrt", "--kind", "soft_topk"], ["--op", "'math.sqrt'", "MODULE:FUNCTION"]),
        (
            ["verify", "--op", "nowhere_at_all:f", "--kind", "soft_topk"],
            ["'nowhere_at_all:f'", "does not import", "No module named"],
        ),
        (["verify", "--op", "math:nothing", "--kind", "soft_topk"], ["--op is 'math:nothing'", "module 'math' has no 'nothing'"]),
        (["verify", "--op", "math:pi", "--kind", "soft_topk"], ["--op is 'math:pi'", "is a float", "a function is needed"]),
        (
            ["verify", "--op", "raises_cli:f", "--kind", "soft_topk"],
            ["'raises_cli'", "RuntimeError: two lines", "raises_cli.py, line 2"],
        ),
        (["verify", "--op", "exits_cli:f", "--kind", "soft_topk"], ["'exits_cli'", "does not import", "SystemExit: 3"]),
        (["verify", "--op", "syntax_cli:f", "--kind", "soft_topk"], ["'syntax_cli'", "does not import", "SyntaxError"]),
        (["benchmark", "--shapes", "8x1024,4by4"], ["--shapes", "'4by4'", "1024x8192"]),
        (["benchmark", "--shapes", ""], ["--shapes is ''", "1024x8192"]),
        (["benchmark", "--only", "softmax,tpok"], ["--only is 'softmax,tpok'", "names 'tpok'", "soft_topk", "budget_sparsemax"]),
        (["configs", "--explain", "1024by8192"], ["--explain", "'1024by8192'", "1024x8192"]),
        (["configs", "--explain", "0x8"], ["--explain", "'0x8'", "at least 1"]),
        (["configs", "--explain", "8x8", "--dtype", "int8"], ["--dtype is 'int8'", "bfloat16"]),
        (["configs", "--dtype", "float32"], ["--dtype is given without --explain"]),
        (["configs", "--op", "soft_topk"], ["--op is given without --explain"]),
        (["replay"], ["required: FILE"]),
        (["replay", "nowhere.json"], ["FILE is 'nowhere.json'", "cannot be read"]),
        (["replay", "corrupt/verify.json"], ["FILE is 'corrupt/verify.json'", "is not JSON"]),
        (["replay", "fine/verify.json"], ["of the command 'verify'", "'exhaust'"]),
        (["replay", "file", "--json", "./file"], ["--json is './file'", "FILE itself"]),
        (["replay", "file", "--seeds", "0"], ["--seeds is '0'", "at least 1"]),
        (["replay", "file", "--strategies", "random,brute_force"], ["--strategies names 'brute_force'", "coordroute-quick"]),
        (["report", "--input", "nowhere"], ["--input is 'nowhere'", "does not exist"]),
        (["report", "--input", "file"], ["--input is 'file'", "not a folder"]),
        (["report", "--input", "folder"], ["--input is 'folder'", "verify.json"]),
        (["report", "--input", "corrupt"], ["--input is 'corrupt'", "verify.json is not JSON"]),
        (["report", "--input", "old"], ["--input is 'old'", "verify.json has no facets", "a list is needed"]),
        (["report", "--input", "fine", "--output", "file"], ["--output is 'file'", "is a file", "a folder is needed"]),
        (["verify", "--exampels", "3"], ["unknown argument --exampels 3", "coordroute verify --help"]),
        (["verfy"], ["COMMAND is 'verfy'", "verify"]),
        (["--verbose"], ["unknown argument --verbose", "coordroute --help"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_an_error_is_one_line_that_says_what_came_and_what_is_allowed(run, argv, parts):
    Path("file").write_text("")
    Path("folder").mkdir()
    Path("corrupt").mkdir()
    Path("corrupt/verify.json").write_text("{")
    Path("old").mkdir()
    Path("old/verify.json").write_text(json.dumps({name: value for name, value in checked(row()).items() if name != "facets"}))
    Path("fine").mkdir()
    Path("fine/verify.json").write_text(json.dumps(checked(row())))
    Path("raises_cli.py").write_text("x = 1\nraise RuntimeError('two\\nlines')\n")
    Path("exits_cli.py").write_text("raise SystemExit(3)\n")
    Path("syntax_cli.py").write_text("def f(:\n")
    prog = f"coordroute {argv[0]}" if argv[0] in COMMANDS else "coordroute"
    one_line_error(run(*argv), prog, *parts)


@pytest.mark.parametrize("name", ["autotune", "verify", "benchmark", "configs"])
def test_an_environment_variable_that_is_not_allowed_is_an_error(run, name, monkeypatch):
    monkeypatch.setenv("COORDROUTE_TUNED", "yes")
    one_line_error(run(name), f"coordroute {name}", "environment variable COORDROUTE_TUNED is 'yes'", "0 or 1")
    monkeypatch.delenv("COORDROUTE_TUNED")
    Path("a file").write_text("")
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", "a file")
    one_line_error(run(name), f"coordroute {name}", "environment variable COORDROUTE_CONFIG_DIR is 'a file'", "not a folder")


def test_a_place_that_cannot_be_written_is_said_before_the_work(run, monkeypatch):
    def forbidden(**rest):
        raise PermissionError(13, "Permission denied")

    def work(*rest, **more):
        raise RuntimeError("the work began")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", forbidden)
    monkeypatch.setattr(search, "run", work)
    monkeypatch.setattr(verify, "run", work)
    said = run("autotune", "--device", "cpu")
    one_line_error(said, "coordroute autotune", "the configuration file is", "Permission denied", "--output")
    one_line_error(run("verify", "--json", "x.json"), "coordroute verify", "--json is 'x.json'", "Permission denied")


@pytest.mark.parametrize("name", ["autotune", "verify", "benchmark"])
def test_without_rich_the_error_names_the_extra(run, name, monkeypatch):
    for module in ("rich", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    one_line_error(run(name), f"coordroute {name}", "rich", "pip install 'coordroute[tune]'")


def test_without_hypothesis_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)

    def needs_it(*rest, **more):
        import hypothesis  # noqa: F401

    monkeypatch.setattr(verify, "run", needs_it)
    one_line_error(run("verify", "--device", "cpu"), "coordroute verify", "hypothesis", "pip install 'coordroute[tune]'")


def test_an_error_that_is_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*rest, **more):
        raise ValueError("a bug")

    monkeypatch.setattr(verify, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("verify", "--device", "cpu")


# --- autotune --------------------------------------------------------------------------------------------------------


CONFIG = LaunchConfig("eager", rows_per_program=64, checkpoint_segments=4).to_json()


def tuned(direction: str = "forward", **changes: object) -> dict:
    made = {
        "key": {"op": "coordinate_descent", "direction": direction, "dtype": "float32", "rows": 256, "n": 512},
        "config": CONFIG,
        "timing": {"median_us": 40.0, "ci_us": [39.0, 41.0], "default_us": 50.0, "samples": 9, "method": "test"},
        "gain": 1.25,
        "candidates": [{"config": CONFIG, "status": "timed", "reason": "", "median_us": 40.0}],
    }
    return made | changes


def evidence(*keys: dict, **changes: object) -> dict:
    return {
        "schema": 1,
        "command": "autotune",
        "device": devices.describe("cpu"),
        "versions": devices.versions(),
        "date": "2026-01-01T00:00:00+00:00",
        "seconds": 61.0,
        "effort": "quick",
        "file": "x.json",
        "resumed": 0,
        "reverified": 0,
        "outdated": {},
        "kept": 0,
        "keys": list(keys),
        "dropped": {},
        "geometric_mean_gain": 1.25 if keys else None,
    } | changes


def test_autotune_shows_what_was_tuned_and_how_to_see_what_serves(run, monkeypatch):
    asked = {}

    def fake(device, effort, output, fresh, progress, *, groups, watch, crew):
        asked.update(device=device, effort=effort, output=output, fresh=fresh)
        assert groups == space.groups("cpu", "full")
        progress(4, 1, "timing something", 12.0)
        watch(search.KeyStatus(Key(**tuned()["key"]), "tuned", 40.0, 1.25))
        return evidence(tuned(), tuned("backward"), resumed=2, kept=3, reverified=1, outdated={"kernel": 2, "driver": 2})

    monkeypatch.setattr(search, "run", fake)
    status, out, err = run("autotune", "--device", "cpu", "--effort", "full", "--fresh", "--json", "deep/evidence.json")
    path = store.output_path("cpu")
    assert asked == {"device": CPU, "effort": "full", "output": path, "fresh": True}
    assert status == 0
    assert err == "coordroute autotune: 1/4, timing something, about 12 s left\n"
    row = next(line for line in out.splitlines() if line.startswith("forward"))
    assert row.split() == ["forward", "float32", "256x512", "50.00", "40.00", "1.25x", "eager", "rows=64", "segments=4"]
    assert f"Wrote 2 entries: {path}\n" in out
    assert "Of these keys 2 are from the interrupted run before." in out
    assert "What 2 keys had was made with another kernel and another driver: it was proved and timed anew, not searched;" in out
    assert "The proofs of 6 other entries hold, and they are as they were; --fresh searches them too." in out
    assert "coordroute configs --device cpu --explain 256x512 --dtype float32" in out
    assert "do not search there" not in out
    written = json.loads(Path("deep/evidence.json").read_text())
    assert written.pop("lookup") is not None
    assert written == evidence(tuned(), tuned("backward"), resumed=2, kept=3, reverified=1, outdated={"kernel": 2, "driver": 2})


def test_autotune_of_some_operators_and_dtypes(run, monkeypatch):
    asked = []

    def fake(*rest, groups, **more):
        asked.append({(group.op, group.dtype) for group in groups})
        return evidence(tuned())

    monkeypatch.setattr(search, "run", fake)
    for more, wanted in (
        (("--only", "soft_topk"), {("soft_topk", "float32"), ("soft_topk", "bfloat16")}),
        (("--dtypes", "bfloat16"), {("soft_topk", "bfloat16"), ("coordinate_descent", "bfloat16")}),
        (("--only", "coordinate_descent,soft_topk", "--dtypes", "float16,float32"), {(op, "float32") for op in kernel_config.OPS}),
        (("--only", "coordinate_descent", "--dtypes", "bfloat16"), {("coordinate_descent", "bfloat16")}),
    ):
        assert run("autotune", "--device", "cpu", "--effort", "full", *more)[0] == 0
        assert asked.pop() == wanted
    monkeypatch.setattr(search, "run", lambda *rest, groups, **more: asked.append(groups) or evidence(tuned()))
    assert run("autotune", "--device", "cpu", "--only", "soft_topk", "--shapes", "700x6000,700x5000,3x20,9x8192")[0] == 0
    assert [(group.rows, group.n) for group in asked.pop()] == [(768, 6400), (4, 32), (16, 8192)]
    said = run("autotune", "--device", "cpu", "--dtypes", "float64")
    one_line_error(said, "coordroute autotune", "--dtypes is 'float64'", "effort quick tunes none on cpu", "allowed are float32")
    assert not asked


def test_autotune_says_what_was_dropped_and_why_and_that_lookups_do_not_see_the_file(run, monkeypatch):
    wrong = {"config": CONFIG, "status": "wrong", "reason": "values: FAILS", "median_us": None}
    found = evidence(
        tuned(candidates=[wrong]), tuned("backward", config=None, timing=None, gain=None), dropped={"wrong": 3, "keys left out": 2}
    )
    monkeypatch.setattr(search, "run", lambda *rest, **more: found)
    status, out, _ = run("autotune", "--device", "cpu", "--output", "mine/x.json")
    assert status == 1  # a default that failed its check
    assert "  3 x wrong; e.g. coordinate_descent forward float32 256x512, eager rows=64 segments=4: values: FAILS\n" in out
    assert "  2 keys left out\n" in out
    assert "none: the default failed" in out
    assert "Wrote 1 entry: mine/x.json\n" in out
    assert f"Lookups do not search there. Move it to {store.output_path('cpu')}" in out


def test_autotune_that_tunes_nothing_has_failed(run, monkeypatch):
    monkeypatch.setattr(search, "run", lambda *rest, **more: evidence())
    status, out, _ = run("autotune", "--device", "cpu")
    assert status == 1 and "Nothing was tuned" in out


@pytest.mark.parametrize(
    "error, status, parts",
    [
        (worker.WorkerError("a worker process does not start"), 1, ["does not start"]),
        (TimeoutError("lock has been held by another process"), 2, ["held by another process", "another `coordroute autotune`"]),
        (OSError(28, "No space left on device"), 2, ["No space left on device", "--output"]),
    ],
)
def test_a_machine_that_does_not_play_along_is_a_message(run, monkeypatch, error, status, parts):
    def fails(*rest, **more):
        raise error

    monkeypatch.setattr(search, "run", fails)
    found, out, err = run("autotune", "--device", "cpu")
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert all(part in err for part in parts), err


def test_interrupted_autotune_says_what_was_kept_and_how_to_go_on(run, monkeypatch):
    output = Path("a b/x.json")

    def interrupted(device, effort, path, fresh, progress, **more):
        kept = journal.Journal(journal.journal_path(path), "fingerprint")
        kept.put("samples", "one 0", {})
        kept.put("compiled", "one", [])
        kept.put("proved", "one", [])
        kept.put("final", "one", {})
        kept.put("group", "one", [tuned(), tuned("backward")])
        kept.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "run", interrupted)
    some = ("--only", "soft_topk", "--dtypes", "float32,bfloat16")
    status, out, err = run("autotune", "--device", "cpu", "--effort", "full", "--fresh", *some, "--output", output)
    assert (status, out) == (130, "")
    assert "kept 2 tuned keys (in a b/x.json) and 3 measurements (in a b/.x.search.0.jsonl)" in err
    # --fresh would throw away what was kept
    assert err.endswith(
        f"run it again without --fresh: coordroute autotune --device cpu --effort full {' '.join(some)} --output 'a b/x.json'\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent SIGINT there")
def test_ctrl_c_ends_autotune_without_a_traceback_and_the_work_is_kept(tmp_path):
    output = tmp_path / "tuned.json"
    path = journal.journal_path(output)
    # a shell that runs the tests in the background has SIGINT ignored, which a process inherits
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    argv = command("autotune", "--device", "cpu", "--output", output, code=heeds)
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        until = time.monotonic() + 120
        while not path.exists() and running.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[0].startswith("coordroute autotune: 0/")
    assert lines[-1].endswith(f"the same command goes on from there: coordroute autotune --device cpu --output {output}")
    measured = [json.loads(line)[0] for line in path.read_text().splitlines()[1:]]
    count = sum(kind in ("samples", "proved", "final") for kind in measured)
    assert count >= 1
    assert f"{count} measurement" in lines[-1] and f"(in {path})" in lines[-1]


def test_nothing_is_said_to_be_kept_where_nothing_was_measured(run, monkeypatch):
    def interrupted(*rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "run", interrupted)
    status, _, err = run("autotune", "--device", "cpu")
    assert status == 130 and "nothing was measured yet" in err


def test_in_a_terminal_the_latest_keys_stand_above_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    key = Key("soft_topk", "forward", "float32", 4, 64)
    with cli._KeyTable("prog") as table:
        for state, best, gain in (("searching", None, None), ("tuned", 12.5, 1.25)):
            table.shown = -1.0
            table.watch(search.KeyStatus(key, state, best, gain))
        for rows in range(table.LATEST):
            table.watch(search.KeyStatus(key._replace(rows=16 + rows), "searching"))
        table.watch(search.KeyStatus(key, "tuned", 12.5, 1.25))
        table.shown = -1.0
        table(8, 3, "timing [something]", 30.0)
    shown = terminal.getvalue()
    assert "soft_topk forward float32 4x64" in shown and "12.50" in shown and "1.25x" in shown
    assert "3/8" in shown and "about 30 s left" in shown and "timing [something]" in shown
    last = shown[shown.rindex("gain") :]
    assert "4x64" in last and "17x64" in last and " 16x64" not in last


def test_under_torchrun_only_the_first_process_reports(run, monkeypatch):
    """The others take part and are silent."""
    asked = []

    class Member:
        local_rank = 1

        def __init__(self, rank):
            self.rank = rank

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            pass

    def fake(*rest, **more):
        asked.append((rest, more))
        return evidence(tuned())

    monkeypatch.setattr(search, "run", fake)
    for rank in (1, 0):
        monkeypatch.setattr(crew.Crew, "from_environment", lambda rank=rank: Member(rank))
        status, out, err = run("autotune", "--device", "cpu")
        assert (status, err) == (0, "") and bool(out) == (rank == 0)
    assert [more["crew"].rank for _, more in asked] == [1, 0] and "watch" not in asked[0][1]
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    one_line_error(run("autotune", "--device", "cpu"), "coordroute autotune", "torchrun", "WORLD_SIZE is 'two'")


# --- verify ----------------------------------------------------------------------------------------------------------


def row(verdict: str = "pass", name: str = "values", **changes: object) -> dict:
    made = {"op": "soft_topk", "property": name, "sentence": "lam", "derivation": "B", "dtype": "float32", "cases": 77}
    made |= {
        "left_out": 3,
        "failing_facets": [],
        "worst_error": 1.5e-7,
        "bound": 3e-6,
        "worst_ratio": 0.05,
        "worst_family": "ties",
        "verdict": verdict,
        "reason": "",
    }
    return made | changes


def facet(name: str, dtype: str = "float32", verdict: str = "pass", failed: tuple = (), reason: str = "") -> dict:
    made = {"op": "soft_topk", "dtype": dtype, "facet": name, "sentence": "rows", "rows": 0 if verdict == "not run" else 48}
    return made | {"failed": list(failed), "verdict": verdict, "reason": reason}


def checked(*rows: dict, failures: tuple = (), facets: tuple = ()) -> dict:
    """The evidence of verify as it stands in a file."""
    made = {"schema": 1, "command": "verify", "device": devices.describe("cpu"), "versions": devices.versions()}
    made |= {"date": "2026-01-01T00:00:00+00:00", "target": "coordroute", "target_version": "coordroute 0.1.0"}
    made |= {"seed": 7, "examples": 2, "seconds": 1.0, "ok": not failures, "properties": list(rows), "facets": list(facets)}
    return made | {"distributions": [], "failures": list(failures)}


def suite(*rows: dict, failures: tuple = (), facets: tuple = ()) -> dict:
    """What the suite itself returns."""
    whole = checked(*rows, failures=failures, facets=facets)
    begin = list(whole).index("seed")
    return dict(list(whole.items())[begin:])


def test_verify_judges_our_operators_and_adds_where_and_with_what(run, monkeypatch):
    asked = {}

    def fake(targets, **rest):
        asked.update(rest, targets=targets)
        unseen = row("not run", "grad k", cases=0, left_out=0, worst_error=None, bound=None, reason="no case came to it")
        rows = (row(), row(dtype="bfloat16", worst_ratio=0.0, left_out=0), unseen)
        return suite(*rows, facets=(facet("plain"), facet("long rows", verdict="not run", reason="none is so long")))

    monkeypatch.setattr(verify, "run", fake)
    status, out, err = run(
        "verify", "--device", "cpu", "--examples", "2", "--seed", "7", "--dtypes", "float32,bfloat16", "--json", "v.json"
    )
    assert (status, err) == (0, "")
    assert asked["targets"] == {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent}
    assert (asked["device"], asked["examples"], asked["seed"], asked["dtypes"]) == (CPU, 2, 7, ("float32", "bfloat16"))
    # processes import both by name
    assert (
        asked["where"] == {op: f"coordroute:{op}" for op in cli.OPS}
        and asked["variants"] == "coordroute.autotune.variants:variants"
    )
    line = next(line for line in out.splitlines() if line.startswith("values"))
    assert line.split() == ["values", "0.05", "exact", "154", "1.91%"]
    assert "not run: long rows: none is so long\n" in out and "fails on" not in out
    assert "not run: soft_topk, grad k (float32): no case came to it\n" in out
    assert "\nAll hold: 2 pass, 1 not run (1 s)\n" in out
    written = json.loads(Path("v.json").read_text())
    assert set(written) == set(checked())
    assert (written["seed"], written["examples"], written["ok"], written["failures"]) == (7, 2, True, [])
    assert (
        (written["target"], written["target_version"]) == ("coordroute", "coordroute 0.1.0")
        and written["command"] == "verify"
        and written["schema"] == 1
    )
    assert written["device"] == devices.describe("cpu") and written["versions"] == devices.versions()
    assert written["date"].endswith("+00:00") and written["properties"][0] == row()


def test_a_failure_is_printed_with_its_code_and_the_status_is_1(run, monkeypatch):
    code = "case = verify.Case(op='soft_topk', rows=(('[bold]', 0),), " + ", ".join(["'x'"] * 60) + ")\n    print('[red]')"
    failure = {"op": "soft_topk", "property": "values", "dtype": "float32", "facet": "ties", "family": "ties", "error": 1.0}
    failure |= {"bound": 0.1, "message": "soft_topk float32: values: FAILS", "reproducer": code}
    also = failure | {"dtype": "bfloat16", "message": "soft_topk bfloat16: values: FAILS", "reproducer": "another"}
    rows = (row("fail", worst_error=None), row("fail", dtype="bfloat16"))
    facets = (facet("ties", verdict="fail", failed=("values", "budget")), facet("ties", "bfloat16", "fail", ("values",)))
    found = suite(*rows, failures=(failure, also), facets=facets)
    monkeypatch.setattr(verify, "run", lambda targets, **rest: found)
    status, out, _ = run("verify", "--device", "cpu")
    assert status == 1
    assert f"\nFAILED: soft_topk float32: values: FAILS\nThis code reproduces it:\n\n{code}\n" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["values", "FAILS", "FAILS", "154", "3.75%"] in lines
    assert ["ties", "values;", "budget", "(float32)"] in lines  # what fails in all dtypes, and in some
    assert "FAILED: soft_topk bfloat16: values: FAILS" in out and "another" not in out  # the code once for each property
    assert "\nNot all hold: 2 fail (1 s)\n" in out


def test_the_version_of_a_target_is_that_of_its_distribution(tmp_path):
    torch_version = importlib.metadata.version("torch")
    assert cli._distribution("torch.nn.functional:softmax") == f"torch {torch_version}"
    assert cli._distribution("coordroute:soft_topk") == "coordroute 0.1.0"
    assert cli._distribution("math:sqrt") is None and cli._distribution("nowhere_at_all:f") is None
    # an adapter says for which distribution it stands; one that is not installed has no version
    (tmp_path / "adapter_cli.py").write_text("DISTRIBUTIONS = {'f': 'numpy', 'g': 'no-such-distribution'}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        importlib.import_module("adapter_cli")
        assert cli._distribution("adapter_cli:f") == f"numpy {importlib.metadata.version('numpy')}"
        assert cli._distribution("adapter_cli:g") is None and cli._distribution("adapter_cli:h") is None
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("adapter_cli")
    adapters = [name for name, value in vars(others).items() if getattr(value, "__module__", "") == others.__name__]
    assert set(others.DISTRIBUTIONS) == set(adapters)


WRONG = """
import os
from coordroute import soft_topk
print("imported")

def topk(scores, k, *, eps, mask=None):
    os.write(1, b"called\\n")  # as compiled code does
    return soft_topk(scores, k, eps=eps, mask=mask), "no tensor"
"""


def test_a_wrong_function_of_the_current_directory_fails_and_the_code_reproduces_it(tmp_path):
    """As a process, with ``--json -``: nothing but JSON is on stdout, whatever the function prints.

    With ``-P``, as for the console script, Python itself does not look into the current directory.
    """
    (tmp_path / "wrong_cli.py").write_text(WRONG)
    argv = ("verify", "--device", "cpu", "--op", "wrong_cli:topk", "--kind", "soft_topk", "--examples", "1", "--json")
    safe = [sys.executable, "-P", "-m", "coordroute", *argv, "-", "--dtypes", "float32"]
    done = subprocess.run(safe, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["target"] == "wrong_cli:topk" and found["target_version"] is None and found["ok"] is False
    assert {"imported", "called"} <= set(done.stderr.splitlines())
    assert "Traceback" not in done.stderr
    assert {(one["op"], one["dtype"]) for one in found["properties"]} == {("soft_topk", "float32")}
    assert all(one["failed"] == ["runs"] for one in found["facets"] if one["verdict"] != "not run")
    (failure,) = found["failures"]
    again = subprocess.run([sys.executable, "-c", failure["reproducer"]], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "runs: it raised TypeError: it returned a tuple, not a tensor" in again.stdout


# --- benchmark -------------------------------------------------------------------------------------------------------


def measured(op: str, implementation: str, direction: str, median: float | None, status: str = "ok") -> dict:
    place = {"direction": direction, "dtype": "float32", "rows": 8, "n": 1024}
    return {"op": op, "implementation": implementation, **place, "median_us": median, "status": status}


def test_benchmark_sets_everything_beside_softmax_and_collects_what_was_skipped(run, monkeypatch):
    asked = []
    results = [
        measured("softmax", "torch.softmax", "forward", 50.0),
        measured("soft_topk", "coordroute", "forward", 100.0),
        measured("budget", "entmax", "forward", None, "skipped: No module named 'entmax'"),
        measured("softmax", "torch.softmax", "backward", 80.0),
        measured("soft_topk", "coordroute", "backward", 40.0),
        measured("budget", "entmax", "backward", None, "skipped: No module named 'entmax'"),
    ]
    found = {"device": devices.describe("cpu"), "seconds": 3.0, "method": "by the clock", "results": results}

    def fake(device, peers, progress, *, shapes, only, seconds):
        asked.append((device, peers, shapes, only, seconds))
        return found

    monkeypatch.setattr(benchmark, "run", fake)
    status, out, err = run("benchmark", "--device", "cpu", "--peers", "--seconds", "7")
    assert (status, err, asked) == (0, "", [(CPU, True, None, None, 7)])
    lines = [line.split() for line in out.splitlines()]
    assert ["8x1024", "float32"] in lines
    assert ["soft_topk", "coordroute", "100.0", "2.00", "40.00", "0.50"] in lines
    assert ["budget", "entmax", "skipped", "skipped"] in lines
    assert "  budget by entmax: No module named 'entmax' (2 times, first 8x1024 float32 forward)\n" in out
    status, out, _ = run("benchmark", "--device", "cpu", "--json", "-")
    assert status == 0 and json.loads(out) == found


def goal(number: str, figure: float | None, met: bool | None, shape: tuple[int, int] = (8, 1024), **changes: object) -> dict:
    made = {"id": number, "op": "soft_topk", "work": "soft_topk forward", "target": "at most 2× torch.softmax forward"}
    made |= {"rows": shape[0], "n": shape[1], "applies": True, "figure": figure, "bfloat16": None, "unit": "×", "met": met}
    return made | {"reason": "", "detail": {}} | changes


def test_benchmark_ends_with_the_targets_and_a_word_for_each(run, monkeypatch):
    goals = [
        goal("1", 1.25, True, bfloat16=1.5, detail={"sweeps": 7}),
        goal("1", 2.5, False, (16, 4096)),
        goal("1", None, None, (32, 8192), reason="no time was left"),
        goal("8a", None, None, reason="--peers measures it"),
        goal("10b", 0.5, None, reason="no limit is set"),
        goal("12b", 20.0, True, unit="floats a row"),
        goal("13a", 0.25, True, rows=None, n=None),
        goal("9a", None, None, applies=False, reason="it is for a GPU"),
    ]
    found = {"device": devices.describe("cpu"), "seconds": 3.0, "method": "by the clock", "results": [], "targets": goals}
    monkeypatch.setattr(benchmark, "run", lambda *rest, **more: found)
    status, out, err = run("benchmark", "--device", "cpu")
    assert (status, err) == (0, "")  # a target that is missed is no failure of the command
    table = [line.split() for line in out[out.index("\nTargets\n") :].splitlines()]
    words = "soft_topk forward {} at most 2× torch.softmax forward {}"
    for line in (
        f"1 {words.format('8x1024', '1.25x (7 sweeps) 1.5x met')}",
        f"1 {words.format('16x4096', '2.5x - missed')}",
        f"1 {words.format('32x8192', '- - not measured')}",
        f"8a {words.format('8x1024', '- - not measured')}",
        f"10b {words.format('8x1024', '0.5x - no limit')}",
        f"12b {words.format('8x1024', '20 floats a row - met')}",
        "13a soft_topk forward at most 2× torch.softmax forward 0.25x - met",
    ):
        assert line.split() in table
    assert "  1 32x8192: no time was left\n  8a: --peers measures it\n  9a: it is for a GPU\n" in out
    assert not any(line[:1] == ["9a"] for line in table)
    assert out.endswith("\nTargets: 3 met, 1 missed, 4 not measured or without a limit\n")


def test_benchmark_measures_what_it_is_asked_for_and_judges_that(run):
    """As it is, on the CPU, for tiny shapes."""
    argv = ("benchmark", "--device", "cpu", "--shapes", "4x64,2X32", "--only", "soft_topk,softmax", "--json", "b.json")
    status, out, _ = run(*argv)
    assert status == 0 and ["4x64", "float32"] in [line.split() for line in out.splitlines()]
    found = json.loads(Path("b.json").read_text())
    assert {(row["rows"], row["n"]) for row in found["results"]} == {(4, 64), (2, 32)}
    assert {row["op"] for row in found["results"]} == {"soft_topk", "softmax"}
    assert all(row["status"] == "ok" for row in found["results"])
    assert {row["id"] for row in found["targets"]} == {target.id for target in targets.TARGETS}
    assert all(row["met"] is None and row["reason"] for row in found["targets"])
    assert "memory" not in found and "host_time" not in found
    Path("in").mkdir()
    Path("b.json").rename("in/benchmark.json")
    assert run("report", "--input", "in", "--output", "out")[0] == 0
    assert "No target was judged" in Path("out/report.md").read_text()


# --- report ----------------------------------------------------------------------------------------------------------


def test_report_prints_the_files_that_it_wrote(run):
    Path("in").mkdir()
    Path("in/verify.json").write_text(json.dumps(checked(row())))
    status, out, err = run("report", "--input", "in", "--output", "out/deep")
    assert (status, err) == (0, "")
    written = [Path(line) for line in out.splitlines()]
    assert Path("out/deep/report.html") in written
    assert all(path.is_file() and path.stat().st_size for path in written)


# --- configs and env -------------------------------------------------------------------------------------------------


def save_entry(key: Key, path: Path) -> None:
    proof = {"kernel_sha256": kernel_sha256(key.op, "cpu"), "binary_sha256": None, "cases": 38, "families": ["normal", "ties"]}
    proof |= {"max_error": {"value": 1e-7, "grad_scores": 2e-7, "grad_k": None}, "bound": 1e-6, "replays_bitwise": True, "seed": 5}
    timing = {"median_us": 40.0, "ci_us": [39.0, 41.0], "default_us": 50.0, "samples": 9, "method": "test"}
    entry = store.make_entry(key, LaunchConfig("eager", rows_per_program=64), timing, proof)
    store.save(path, devices.describe("cpu"), devices.versions(), [entry])


KEY = Key("soft_topk", "forward", "float32", kernel_config.bucket_rows(256), kernel_config.bucket_n(512))


def test_configs_lists_the_files_of_the_search_and_their_entries(run):
    path = store.output_path("cpu")
    status, out, err = run("configs", "--device", "cpu")
    assert (status, err) == (0, "")
    assert f"  1. user folder: {path}\n     missing: no such file\n" in out
    save_entry(KEY, path)
    status, out, err = run("configs", "--device", "cpu")
    assert (status, err) == (0, "")
    assert f"  1. user folder: {path}\n     used (1 entry)\n" in out
    assert ["soft_topk", "forward", "float32", f"{KEY.rows}x{KEY.n}", "40.00", "1.25x", "eager", "rows=64"] in [
        line.split() for line in out.splitlines()
    ]


def test_configs_says_why_an_entry_is_not_used(run):
    path = store.output_path("cpu")
    save_entry(KEY, path)
    path.write_text(path.read_text().replace(kernel_sha256(KEY.op, "cpu"), "0" * 64))
    status, out, _ = run("configs", "--device", "cpu")
    assert status == 0
    assert "     rejected\n     1 not used: stale: the kernel source changed since (00000000, today" in out
    path.write_text("{")
    assert "     rejected: corrupt: not JSON" in run("configs", "--device", "cpu")[1]


def test_configs_says_what_was_proved_with_another_version_and_serves(run):
    path = store.output_path("cpu")
    save_entry(KEY, path)
    assert "another" not in run("configs", "--device", "cpu")[1]
    document = json.loads(path.read_text())
    document["versions"]["torch"] = "0"
    path.write_text(json.dumps(document))
    said = "     used (1 entry)\n     1 used, but proved and timed with another torch"
    status, out, err = run("configs", "--device", "cpu")
    assert (status, err) == (0, "") and f"{said}; `coordroute autotune` proves what it chose anew\n" in out
    assert json.loads(run("configs", "--device", "cpu", "--json")[1])["files"][0]["outdated"] == {"torch": 1}


def test_configs_explains_which_entry_serves_a_call(run, monkeypatch):
    path = store.output_path("cpu")
    save_entry(KEY, path)
    argv = ("configs", "--device", "cpu", "--explain", "256x512", "--op", "soft_topk")
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    forward, backward = out.split("\nsoft_topk backward")
    assert forward.startswith("soft_topk forward on 256x512 float32 (bucket 256x512)")
    assert f"user folder: {path}\n" in forward and "the entry of this very bucket" in forward
    assert "40.00 us (39.00 to 41.00), the default 50.00 us, 1.25x" in forward
    assert "38 rows of 2 families, replays bitwise, seed 5" in forward
    assert "value 1e-07 of 1e-06, grad_scores 2e-07 of 1e-06 allowed" in forward
    assert "served by  heuristic" in backward and "no usable entry for soft_topk backward float32" in backward
    status, out, err = run(*argv, "--json", "explained.json")
    assert status == 0 and out.endswith("JSON: explained.json\n")
    data = json.loads(Path("explained.json").read_text())
    assert [one["source"] for one in data["explained"]] == ["user folder", "heuristic"]
    assert data["explained"][0]["entry"]["timing"]["median_us"] == 40.0
    monkeypatch.setenv("COORDROUTE_TUNED", "0")
    assert run("configs", "--device", "cpu")[1].count("COORDROUTE_TUNED=0: no file is read") == 1


def test_configs_explains_both_operators_in_both_directions(run):
    status, out, _ = run("configs", "--device", "cpu", "--explain", "8x1024", "--dtype", "bfloat16", "--json")
    explained = json.loads(out)["explained"]
    assert status == 0
    assert [(one["key"]["op"], one["key"]["direction"]) for one in explained] == [
        (op, direction) for op in cli.OPS for direction in ("forward", "backward")
    ]
    assert {one["key"]["dtype"] for one in explained} == {"bfloat16"}


def test_env_works_without_triton_and_rich_and_without_a_gpu(tmp_path):
    code = "import sys; sys.modules.update({'triton': None, 'rich': None})"
    done = process("env", code=code, CUDA_VISIBLE_DEVICES="", COORDROUTE_CONFIG_DIR=str(tmp_path / "mine"), COORDROUTE_TUND="0")
    assert done.returncode == 0, done.stderr
    assert f"torch       {torch.__version__}\n" in done.stdout
    assert "\nDevice cpu (default)\n" in done.stdout
    assert f"  1. environment folder: {tmp_path / 'mine'}" in done.stdout
    assert f"  COORDROUTE_CONFIG_DIR = {str(tmp_path / 'mine')!r}\n" in done.stdout
    assert "    allowed  0 or 1\n" in done.stdout
    assert done.stderr.count("\n") == 1 and "warning: environment variable COORDROUTE_TUND is none" in done.stderr


def test_env_is_json_too_and_shows_the_rest_where_a_variable_is_wrong(run, monkeypatch):
    status, out, err = run("env", "--json")
    data = json.loads(out)
    assert (status, err) == (0, "")
    assert data["versions"]["torch"] == str(torch.__version__) and data["devices"]["cpu"] == devices.describe("cpu")
    assert [one["name"] for one in data["environment"]] == list(store.ENVIRONMENT)
    assert data["problem"] is None
    monkeypatch.setenv("COORDROUTE_TUNED", "yes")
    status, out, err = run("env")
    assert status == 2
    assert "\nDevice cpu" in out and "  COORDROUTE_TUNED = 'yes'\n" in out
    assert err == "coordroute env: error: environment variable COORDROUTE_TUNED is 'yes'; allowed is 0 or 1\n"


# --- output ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


COLUMNS = [("name", "left"), ("what", "fold"), ("number", "right")]


@pytest.mark.parametrize("columns", ["30", "60", "200"])
def test_no_cell_of_a_table_is_cut_in_any_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    words = [f"word{i:02}" for i in range(12)]
    table = cli._table("title", COLUMNS, [["a" * 25, " ".join(words), "123456.7"]])
    assert all(word in table for word in words) and "a" * 25 in table and "123456.7" in table
    assert "…" not in table and "\x1b" not in table
    if columns == "60":
        assert max(map(len, table.splitlines())) <= 60


def test_there_is_color_in_a_terminal_only_and_not_with_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    rows = [["a", ("b [bold]", "red"), "1"]]
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b[31mb [bold]" in cli._table("title", COLUMNS, rows)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli._table("title", COLUMNS, rows)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    piped = cli._table("title", [*COLUMNS, ("more", "fold")], [["a", "b [bold] " * 40, "1", "c" * 300]])
    assert "\x1b" not in piped and "b [bold] " * 39 in piped and "c" * 300 in piped


def test_progress_is_a_line_every_ten_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with cli._Progress("prog") as progress:
        for second in range(25):
            now[0] = 100.0 + second
            progress(25, second, f"step {second}", 600.0 if second else None)
    assert capsys.readouterr().err.splitlines() == [
        "prog: 0/25, step 0",
        "prog: 10/25, step 10, about 10 min left",
        "prog: 20/25, step 20, about 10 min left",
    ]


def test_progress_is_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli._Progress("prog") as progress:
        progress(25, 5, "verified [something]", 30.0)
    shown = terminal.getvalue()
    assert "5/25" in shown and "about 30 s left" in shown and "verified [something]" in shown


def test_a_warning_is_one_line_without_the_source(run, monkeypatch):
    def warns(targets, **rest):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("coordroute: two\nlines", store.ConfigurationWarning, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        return suite(row())

    monkeypatch.setattr(verify, "run", warns)
    shown = warnings.showwarning
    _, _, err = run("verify", "--device", "cpu")
    assert err.splitlines()[0] == "coordroute verify: warning: two lines"
    assert err.splitlines()[1].startswith("coordroute verify: warning: DeprecationWarning (test_cli.py, line ")
    assert err.endswith("): old\n") and err.count("\n") == 2
    assert warnings.showwarning is shown


def test_ctrl_c_in_other_commands_is_one_line(run, monkeypatch):
    def interrupted(*rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupted)
    assert run("verify", "--device", "cpu") == (130, "", "coordroute verify: interrupted; no result was written\n")


def test_json_has_null_for_what_is_no_number(run, monkeypatch):
    monkeypatch.setattr(verify, "run", lambda targets, **rest: suite(row(worst_ratio=float("inf"), bound=float("nan"))))
    _, out, _ = run("verify", "--device", "cpu", "--json")
    run("verify", "--device", "cpu", "--json", "v.json")
    for text in (out, Path("v.json").read_text()):
        found = json.loads(text, parse_constant=lambda name: pytest.fail(name))["properties"][0]
        assert found["worst_ratio"] is None and found["bound"] is None and found["cases"] == 77


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """The reading end is closed before anything is written; the JSON is written all the same."""
    reads, writes = os.pipe()
    os.close(reads)
    argv = command("env", "--json", tmp_path / "env.json")
    done = subprocess.run(argv, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60, env=dict(os.environ))
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "env.json").read_text())["command"] == "env"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--help"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "coordroute: error: stdout cannot be written to (No space left on device)\n")


def test_an_output_that_is_not_unicode_is_no_error(tmp_path):
    done = process("env", "--json", tmp_path / "é.json", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "JSON: " in done.stdout and "\\xe9.json" in done.stdout
