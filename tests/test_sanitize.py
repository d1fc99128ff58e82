"""`coordroute sanitize`: what compute-sanitizer says is read right, nothing that was not looked at is called clean, and every
shipped configuration is looked at. The logs are laid out as in NVIDIA's manual and release notes; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coordroute import cli
from coordroute.autotune import device as devices
from coordroute.autotune import launches, sanitize, store
from coordroute.autotune.launches import Case
from coordroute.kernels.config import LaunchConfig

CPU = torch.device("cpu")
PROCESSORS = 132

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
INVALID = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _forward+0x12d0 in soft_topk.py:453
=========     by thread (37,0,0) in block (2,0,0)
=========     Address 0x7f31a0a007fc is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f31a0a00000 of size 2,044 bytes
=========
========= Invalid __global__ read of size 2 bytes
=========     at _backward_shared+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x87654320 is out of bounds
=========     and is 124,310,666,263,776 bytes before the nearest allocation at 0x710fdc800000 of size 1,024 bytes
=========
========= ERROR SUMMARY: 2 errors
"""
RACES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _iterate+0x90 in coordinate_descent.py:310
=========     and Read access at _iterate+0x100 in coordinate_descent.py:312 [508 hazards]
=========
========= WARNING: Race reported between Write access at _forward+0xf0 in rows.py:70
=========     and Read access at _forward+0x280 in rows.py:70 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
UNINITIALISED = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<int>>(int, T2)+0x60
=========     by thread (122,0,0) in block (0,0,0)
=========     Address 0x7f936fa001e8
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _backward+0x70 in soft_topk.py:540
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= ERROR SUMMARY: 2 errors
"""
FOREIGN = (
    UNINITIALISED.split("========= Uninitialized")[0]
    + "========= Uninitialized"
    + UNINITIALISED.split("========= Uninitialized")[1]
)
FOREIGN += "========= ERROR SUMMARY: 1 error\n"
DIVERGED = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp
=========     at _forward+0xf0 in soft_topk.py:79
=========     by thread (37,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
MANY = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _forward+0x12d0 in soft_topk.py:453
=========     by thread (37,0,0) in block (2,0,0)
=========     Address 0x7f31a0a007fc is out of bounds
=========
========= ERROR SUMMARY: 4,096 errors
========= ERROR SUMMARY: 3096 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
NEVER_RAN = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
========= Error: couldn't find exit code.
"""
NO_LIBRARY = "========= COMPUTE-SANITIZER\n========= Unable to find injection library libsanitizer-collection.so\n"
UNTRACKED = """\
========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer encountered an error while launching _forward and didn't track the launch. \
Errors might go undetected. (Unable to allocate enough memory to perform the requested operation)
=========
========= ERROR SUMMARY: 0 errors
"""

TINY = LaunchConfig("resident", 32, 2, 1, 1, 20)
SPLIT = LaunchConfig("split", 16, 1, 1, 1, 20, programs_per_row=2)


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "errors", "kernels", "trouble"),
    [
        (CLEAN, 0, 0, [], 0),
        (NO_RACE, 0, 0, [], 0),
        (INVALID, 2, 2, ["_forward", "_backward_shared"], 0),
        (RACES, 2, 2, ["_iterate", "_forward"], 0),
        (UNINITIALISED, 2, 1, ["_backward"], 0),
        (FOREIGN, 1, 0, [], 0),
        (DIVERGED, 1, 1, ["_forward"], 0),
        (NEVER_RAN, None, 0, [], 2),
        (NO_LIBRARY, None, 0, [], 1),
        (UNTRACKED, 0, 0, [], 1),
        ("", None, 0, [], 0),
    ],
)
def test_log_is_read(text, total, errors, kernels, trouble):
    log = sanitize.parse("printed by the program\n" + text)
    assert (log.total, log.errors, len(log.trouble)) == (total, errors, trouble)
    assert [report.kernel for report in log.reports if not report.foreign] == kernels


def test_reports_that_were_not_printed_count():
    assert sanitize.parse(MANY).errors == 4096


def test_report_keeps_what_says_where():
    first = sanitize.parse(INVALID).reports[0].text
    assert first.startswith("Invalid __global__ write of size 4 bytes\nat _forward+0x12d0 in soft_topk.py:453\n")
    assert first.endswith("of size 2,044 bytes")


# --- verdicts --------------------------------------------------------------------------------------------------------


class _Ended:
    """A process that has ended."""

    def __init__(self, status: int) -> None:
        self.returncode = status


def _job(
    folder: Path, log: str | None, events: list[dict], status: int = 0, killed: bool = False, tool: str = "memcheck"
) -> sanitize.Job:
    case = Case("soft_topk", "float32", TINY, TINY, 5, 32, "whole")
    job = sanitize.Job("one", tool, case.group, [case, replace(case, inputs="odd", n=23)], folder)
    job.process, job.killed = _Ended(status), killed
    job.journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    if log is not None:
        job.log.write_text(log)
    return job


ALL = [{"pid": 1}, {"begin": 0}, {"end": 0}, {"begin": 1}, {"end": 1}, {"done": True}]


@pytest.mark.parametrize(
    ("log", "events", "status", "killed", "verdict", "reason"),
    [
        (CLEAN, ALL, 0, False, "clean", ""),
        (FOREIGN, ALL, sanitize.ERRORS_STATUS, False, "clean", ""),
        (INVALID, ALL, sanitize.ERRORS_STATUS, False, "errors", ""),
        (RACES, ALL, 0, False, "errors", ""),
        (INVALID, ALL[:4], 0, True, "errors", "no time was left to end it at soft_topk float32 5x23 odd"),
        (CLEAN, ALL[:4], 0, True, "not finished", "no time was left to end it at soft_topk float32 5x23 odd"),
        (CLEAN, ALL[:-1], 1, False, "not finished", "did not all end (exit status 1)"),
        # status 0 and no error, of a program that did not start
        (CLEAN, [], 0, False, "not finished", "did not all end"),
        (NEVER_RAN, [], 0, False, "not finished", "Target application terminated"),
        (None, ALL, 0, False, "not finished", "no summary"),
        (UNTRACKED, ALL, 0, False, "not finished", "didn't track the launch"),
        (CLEAN, ALL, sanitize.ERRORS_STATUS, False, "not finished", "though the log has no error"),
        (
            CLEAN,
            [*ALL[:4], {"failed": 1, "error": "RuntimeError: no"}, {"done": True}],
            0,
            False,
            "not finished",
            "RuntimeError: no",
        ),
    ],
)
def test_only_what_ended_is_clean(tmp_path, log, events, status, killed, verdict, reason):
    found = sanitize.judge(_job(tmp_path, log, events, status, killed))
    assert found["verdict"] == verdict
    assert reason in found["reason"] and (found["reason"] == "") == (reason == "")
    assert (found["launches"], found["planned"]) == (2 * sum("end" in event for event in events), 4)


def test_job_that_was_never_begun_is_not_finished(tmp_path):
    job = _job(tmp_path, CLEAN, ALL)
    job.process = None
    assert sanitize.judge(job)["verdict"] == "not finished"


# --- the binary ------------------------------------------------------------------------------------------------------


def _script(path: Path, body: str = 'echo "Version 2025.3.1.0 (build 1) (public-release)"') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No compute-sanitizer anywhere."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(sanitize, "find_spec", lambda name: None)
    if Path("/usr/local/cuda").exists():
        monkeypatch.setattr(sanitize, "_candidates", lambda: [])
    return tmp_path


def test_binary_is_found(nowhere, monkeypatch):
    class Package:
        submodule_search_locations = (str(nowhere / "site" / "nvidia"),)

    monkeypatch.undo()
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize, "find_spec", lambda name: Package)
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "toolkit"))
    packaged = _script(nowhere / "site" / "nvidia" / "cu13" / "bin" / "compute-sanitizer")
    if not Path("/usr/local/cuda").exists():
        assert sanitize.find().command == (str(packaged),)
    toolkit = _script(nowhere / "toolkit" / "compute-sanitizer" / "compute-sanitizer")
    assert sanitize.find().command == (str(toolkit),)
    on_path = _script(nowhere / "bin" / "compute-sanitizer")
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(on_path))
    assert sanitize.find() == ((str(on_path),), "2025.3.1.0")
    assert sanitize.find(str(packaged)).command == (str(packaged),)


def test_libraries_that_lie_beside_bin_are_named(nowhere):
    binary = _script(nowhere / "nvidia" / "cuda_sanitizer_api" / "bin" / "compute-sanitizer")
    library = binary.parent.parent / "lib" / "libsanitizer-collection.so"
    library.parent.mkdir()
    library.touch()
    assert sanitize.find(str(binary)).command == (str(binary), "--injection-path", str(library.parent))


def test_what_is_no_sanitizer_is_said(nowhere, capsys):
    with pytest.raises(sanitize.NotFound, match=r"not found on PATH.*nvidia-cuda-sanitizer-api.*CUDA toolkit.*--sanitizer PATH"):
        sanitize.find()
    with pytest.raises(sanitize.NotFound, match="is no file"):
        sanitize.find(str(nowhere / "missing"))
    with pytest.raises(sanitize.NotFound, match="says no version"):
        sanitize.find(str(_script(nowhere / "other", "echo hello")))
    plain = _script(nowhere / "plain")
    plain.chmod(0o644)
    if not os.access(plain, os.X_OK):
        with pytest.raises(sanitize.NotFound, match=r"not executable.*chmod \+x"):
            sanitize.find(str(plain))
    assert cli.main(["sanitize"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("coordroute sanitize: error: ") and said.count("\n") == 1 and "nvidia-cuda-sanitizer-api" in said


def test_command_wants_a_gpu_and_known_tools(nowhere, capsys):
    binary = _script(nowhere / "compute-sanitizer")
    assert cli.main(["sanitize", "--device", "cpu", "--sanitizer", str(binary)]) == 2
    assert "--device is 'cpu'" in capsys.readouterr().err
    assert cli.main(["sanitize", "--tools", "memcheck,lint"]) == 2
    assert "names 'lint'; allowed are, with commas, memcheck, racecheck" in capsys.readouterr().err
    assert cli.SANITIZERS == sanitize.TOOLS


# --- the launches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The entries of every shipped file of a GPU, and the launches for them."""
    files = [json.loads(path.read_text()) for path in sorted(store.SHIPPED.glob("*.json"))]
    files = [file for file in files if not devices.architecture(file["device"]["capability"]).startswith("cpu")]
    assert files
    configs = [{store.parse_key(one["key"]): LaunchConfig.from_json(one["config"]) for one in file["entries"]} for file in files]
    return configs, launches.plan(configs, PROCESSORS)


def test_every_shipped_configuration_is_launched_with_all_inputs(shipped):
    configs, cases = shipped
    for inputs in launches.INPUTS:
        covered = {one for case in cases if case.inputs == inputs for one in case.configurations()}
        for file in configs:
            assert {(key.op, key.direction, key.dtype, config) for key, config in file.items()} <= covered
    variants = {(case.op, config.variant) for case in cases for config in (case.forward, case.backward)}
    assert variants == {(op, variant) for op in cli.OPS for variant in ("resident", "split", "tiled")}
    assert {(case.op, case.dtype) for case in cases} >= {(op, "float64") for op in cli.OPS}


def test_launches_do_all_that_a_call_does(shipped):
    configs, cases = shipped
    for case in cases:
        for config, other in ((case.forward, case.backward), (case.backward, case.forward)):
            if config.variant == "resident":
                # several programs, and rows that are not there in the last
                assert case.rows > config.rows_per_program and (config.rows_per_program == 1 or case.rows % config.rows_per_program)
                # what is whole for the tiles of the other is not for a resident row
                whole = case.inputs == "whole" and (other.variant == "resident" or case.n == config.block)
                assert case.n == config.block if whole else config.block // 2 < case.n < config.block
            if config.variant == "tiled":
                assert case.n > config.block
            if config.variant == "split":
                assert case.n >= 16 * config.programs_per_row
        if case.forward.variant == "split":
            # all run side by side, and as many share a row as for the key
            key = next(
                (
                    key
                    for file in configs
                    for key, config in file.items()
                    if config == case.forward and key.n * 3 // 4 <= case.n <= key.n
                ),
                None,
            )
            assert key is None or PROCESSORS // case.rows >= min(case.forward.programs_per_row, PROCESSORS // key.rows)
            assert case.rows * min(case.forward.programs_per_row, PROCESSORS // case.rows) <= PROCESSORS
        assert case.n % 2 == 1 if case.inputs in ("odd", "special") else case.n % 16 == 0
        assert case.rows * case.n <= 1 << 24


def test_files_of_the_device_are_what_is_launched(monkeypatch, tmp_path):
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(store, "output_path", lambda device: tmp_path / "none.json")
    assert launches.configured(CPU) == []
    verdict = store.Verdict("shipped", store.SHIPPED / "nvidia-h100-80gb-hbm3.json", "used", "", 1, {})
    monkeypatch.setattr(store, "files", lambda device: [verdict, replace(verdict, path=tmp_path / "none.json", entries=0)])
    monkeypatch.setattr(devices, "backend", lambda device: "triton")
    (found,) = launches.configured(CPU)
    assert len(found) == len(json.loads(verdict.path.read_text())["entries"])


@pytest.mark.parametrize(
    ("op", "dtype", "forward", "backward", "inputs", "n"),
    [
        ("soft_topk", "float32", TINY, TINY, "whole", 32),
        ("soft_topk", "bfloat16", LaunchConfig("tiled", 16, 1, 1, 1), SPLIT, "aligned", 32),
        ("soft_topk", "float32", TINY, TINY, "special", 23),
        ("coordinate_descent", "bfloat16", TINY, TINY, "odd", 23),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_launches_run(op, dtype, forward, backward, inputs, n):
    case = Case(op, dtype, forward, backward, 5 if inputs == "special" else 3, n, inputs)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    launches.run(case, CPU)


def test_nothing_is_written_behind_rows():
    values = torch.arange(6.0).reshape(2, 3)
    spread = launches._with_gaps(values, 2, CPU)
    assert spread.equal(values) and spread.stride() == (5, 1)
    # the last row ends where the memory does
    assert spread.untyped_storage().nbytes() == 8 * 4


# --- the processes ---------------------------------------------------------------------------------------------------

FAKE = """\
import os, pathlib, subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Version 2025.3.1.0 (build 1) (public-release)")
    sys.exit()
log = pathlib.Path(arguments[arguments.index("--log-file") + 1])
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
if arguments[-1].startswith("planted:"):
    log.write_text(PLANTED)
    sys.exit(86)
done = subprocess.run(arguments[arguments.index(sys.executable):])
log.write_text(LOG)
sys.exit(done.returncode or STATUS)
"""
SEEN = INVALID.replace("_forward", "_planted_memcheck")
LAUNCHER = """\
import json, sys
events = [{"pid": 1 << 30}, {"begin": 0}, {"end": 0}, {"done": True}]
open(sys.argv[2], "w").write("".join(json.dumps(event) + "\\n" for event in events))
"""


def _fake(path: Path, log: str, status: int = 0, planted: str = SEEN) -> sanitize.Sanitizer:
    program = path / "sanitizer.py"
    program.write_text(FAKE.replace("LOG", repr(log)).replace("STATUS", str(status)).replace("PLANTED", repr(planted)))
    return sanitize.find(str(_script(path / "compute-sanitizer", f'exec {sys.executable} {program} "$@"')))


def test_tools_run_and_a_blind_one_is_never_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "configured", lambda device: [])
    case = Case("soft_topk", "float32", TINY, TINY, 5, 32, "whole")
    monkeypatch.setattr(launches, "plan", lambda files, processors: [case])
    shown: list[tuple] = []

    def run(sanitizer: sanitize.Sanitizer, **more) -> dict:
        return sanitize.run(CPU, sanitizer, ["memcheck"], 100, lambda *told: shown.append(told), **more)

    found = run(_fake(tmp_path, CLEAN))
    (tool,) = found["tools"]
    assert found["ok"] and tool["verdict"] == "clean" and tool["sees_planted_fault"], tool
    assert (tool["launches"], tool["configurations"], tool["errors"], tool["reports"]) == (2, 2, 0, [])
    assert found["versions"]["compute-sanitizer"] == "2025.3.1.0" and shown[-1][:2] == (2, 2)
    assert all(name in found for name in ("device", "date", "seconds"))

    # from here on the program only says that it launched
    program = tmp_path / "launcher.py"
    program.write_text(LAUNCHER)
    monkeypatch.setattr(sanitize, "PROGRAM", (sys.executable, str(program)))
    found = run(_fake(tmp_path, INVALID, sanitize.ERRORS_STATUS))
    (tool,) = found["tools"]
    assert not found["ok"] and (tool["verdict"], tool["errors"]) == ("errors", 2)
    assert [report["kernel"] for report in tool["reports"]] == ["_forward", "_backward_shared"]
    assert tool["cases"] == [sanitize._named(case)]
    text = "\n".join(cli._show_sanitize(found))
    assert "2 of 2" in text and "Invalid __global__ write of size 4 bytes" in text and "1 errors" in text

    for planted in (CLEAN, INVALID, NEVER_RAN):
        found = run(_fake(tmp_path, CLEAN, planted=planted))
        (tool,) = found["tools"]
        assert not found["ok"] and tool["verdict"] == "not finished" and "does not see the fault" in tool["reason"]
        assert "not seen" in "\n".join(cli._show_sanitize(found))
    assert not run(_fake(tmp_path, CLEAN, planted=CLEAN), self_check=True)["ok"]
    assert run(_fake(tmp_path, CLEAN), self_check=True)["ok"]


def test_launches_with_errors_are_looked_at_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "configured", lambda device: [])
    cases = [Case("soft_topk", "float32", TINY, TINY, 5, n, "whole") for n in (32, 23)]
    monkeypatch.setattr(launches, "plan", lambda files, processors: cases)
    program = tmp_path / "launcher.py"
    program.write_text(LAUNCHER)
    monkeypatch.setattr(sanitize, "PROGRAM", (sys.executable, str(program)))
    sanitizer = _fake(tmp_path, INVALID, sanitize.ERRORS_STATUS)
    fake = tmp_path / "sanitizer.py"
    # a log with errors wherever the row of 23 is among the launches
    has = "'\"n\": 23' in pathlib.Path(arguments[-1]).read_text()"
    fake.write_text(
        fake.read_text().replace(f"log.write_text({INVALID!r})", f"log.write_text({INVALID!r} if {has} else {CLEAN!r})")
    )
    (tool,) = sanitize.run(CPU, sanitizer, ["memcheck"], 100, lambda *told: None)["tools"]
    assert tool["verdict"] == "errors" and tool["cases"] == [sanitize._named(cases[1])]


def test_a_group_is_shared_between_processes_and_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "configured", lambda device: [])
    monkeypatch.setattr(sanitize, "PART", 2)
    cases = [Case("soft_topk", "float32", TINY, TINY, 5, n, "whole") for n in (32, 31, 23, 22, 21)]
    monkeypatch.setattr(launches, "plan", lambda files, processors: cases)
    program = tmp_path / "launcher.py"
    # the second launch of the process that has the row of 21 is never ended
    program.write_text(
        "import json, sys\n"
        "cases = json.load(open(sys.argv[3])) if sys.argv[3].endswith('.json') else []\n"
        f"open({str(tmp_path / 'devices')!r}, 'a').write(sys.argv[1] + '\\n')\n"
        "events = [{'pid': 1 << 30}]\n"
        "for i, case in enumerate(cases):\n"
        "    events += [{'begin': i}] + [{'end': i}] * (case['n'] != 21)\n"
        "events += [{'done': True}] * all(case['n'] != 21 for case in cases)\n"
        "open(sys.argv[2], 'w').write(''.join(json.dumps(event) + '\\n' for event in events))\n"
    )
    monkeypatch.setattr(sanitize, "PROGRAM", (sys.executable, str(program)))
    found = sanitize.run(CPU, _fake(tmp_path, CLEAN), ["memcheck"], 100, lambda *told: None, gpus=("cpu:0", "cpu:1"))
    (tool,) = found["tools"]
    (group,) = tool["groups"]
    assert (group["launches"], group["planned"], group["verdict"]) == (8, 10, "not finished") and not found["ok"]
    assert tool["launches"] == 8 and "did not all end" in group["reason"] and tool["verdict"] == "not finished"
    assert set((tmp_path / "devices").read_text().split()) == {"cpu:0", "cpu:1"}


def test_process_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "configured", lambda device: [])
    case = Case("soft_topk", "float32", TINY, TINY, 5, 32, "whole")
    monkeypatch.setattr(launches, "plan", lambda files, processors: [case])
    slow = _script(tmp_path / "compute-sanitizer", '[ "$1" = --version ] && echo "Version 1" && exit; sleep 60')
    found = sanitize.run(CPU, sanitize.find(str(slow)), ["racecheck"], 1, lambda *told: None)
    (tool,) = found["tools"]
    assert not found["ok"] and tool["verdict"] == "not finished" and found["seconds"] < 30
    assert "no time was left" in tool["reason"]


def test_planted_faults_compile():
    """In a process of its own: Triton's interpreter replaces the kernels of this one."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    code = """
        import triton
        from coordroute.autotune.planted import KERNELS
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        for tool, kernel in KERNELS.items():
            source = ASTSource(kernel, {"x_ptr": "*i32", "y_ptr": "*i32", "N": "constexpr"}, {"N": 128})
            print(tool, triton.compile(source, target=GPUTarget("cuda", 90, 32)).metadata.name)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:-1] == [f"{tool} _planted_{tool}" for tool in sanitize.TOOLS], done.stderr
