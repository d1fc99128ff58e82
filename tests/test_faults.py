"""Candidates that crash, hang, take all memory or compute something wrong cost themselves and no more; so do killed processes.

The workers are real processes (``faulty_worker.py``), in which the kernels fail where a test wants it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from coordroute.autotune import journal, search, store, timer, worker
from coordroute.autotune.space import Group
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig

CPU = torch.device("cpu")
PROGRAM = Path(__file__).with_name("faulty_worker.py")
GROUP = Group("soft_topk", "float32", 4, 64)
OTHER = Group("coordinate_descent", "float32", 4, 64)
GROUPS = [GROUP, OTHER, Group("soft_topk", "float32", 4, 128), Group("coordinate_descent", "float32", 4, 32)]
DEFAULT = kernel_config.heuristic(GROUP.key("forward"), "cpu").rows_per_program
KINDS = {1: "illegal", 2: "illegal, says Triton", 3: "exits", 4: "killed", 5: "hangs", 6: "memory"}
STATUS = {1: "crashes", 2: "crashes", 3: "crashes", 4: "crashes", 5: "hangs", 6: "out of memory", 7: "timed", DEFAULT: "timed"}

_spec = importlib.util.spec_from_file_location("faulty_worker", PROGRAM)
faulty = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faulty)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Short limits, and a file that lies where lookups find it."""
    monkeypatch.setitem(timer.PREPARE_SECONDS, "cpu", 5.0)
    monkeypatch.setitem(timer.ROUND_SECONDS, "cpu", 0.1)
    monkeypatch.setattr(timer, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 60.0)
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", str(tmp_path))
    store.reload()
    yield store.output_path(CPU)
    store.reload()


@pytest.fixture
def spec(tmp_path):
    """Writes what a worker is told; the command line of such a worker."""

    def call(*faults: dict, costs: dict | None = None, name: str = "spec", **more) -> tuple[str, ...]:
        path = tmp_path / f"{name}.spec"
        path.write_text(json.dumps({"log": str(tmp_path / "log"), "faults": faults, "costs": costs or {}, **more}))
        return (sys.executable, "-P", str(PROGRAM), "worker", str(path))

    return call


@pytest.fixture
def asked(tmp_path):
    """The requests that workers got, and for what a round was: the configurations."""

    def call() -> list[dict]:
        requests = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        added: dict[tuple, dict] = {}
        for one in requests:
            if one["do"] == "add":
                added[one["process"], one["name"], one["id"]] = one["config"]
            if one["do"] == "round":
                one["configs"] = [added[one["process"], one["name"], number] for number in one["ids"]]
        return requests

    return call


def statuses(result: dict, direction: str = "forward", op: str = "soft_topk") -> dict[int, str]:
    (key,) = [one for one in result["keys"] if (one["key"]["direction"], one["key"]["op"]) == (direction, op)]
    return {one["config"]["rows_per_program"]: one["status"] for one in key["candidates"]}


def reasons(result: dict, direction: str = "forward") -> dict[int, str]:
    (key,) = [one for one in result["keys"] if one["key"]["direction"] == direction]
    return {one["config"]["rows_per_program"]: one["reason"] for one in key["candidates"]}


def rows_of(result: dict) -> dict[tuple[str, str], int | None]:
    """What was chosen, by operator and direction; and it is what lookups find, with a proof that holds."""
    chosen = {}
    written = {Key(**one["key"]): one for one in json.loads((Path(result["file"])).read_text())["entries"]}
    for one in result["keys"]:
        key = Key(**one["key"])
        assert (key in written) == (one["config"] is not None)
        if one["config"] is not None:
            assert written[key]["config"] == one["config"]
            assert store.check_proof(written[key]["proof"], key, "cpu") is None
            assert store.lookup(CPU, key) == LaunchConfig.from_json(one["config"])
        chosen[key.op, key.direction] = one["config"] and one["config"]["rows_per_program"]
    return chosen


def run(quick, monkeypatch, program, groups=(GROUP,), candidates=(1, 2, 3), **more) -> dict:
    faulty.arrange(monkeypatch.setattr, candidates)
    result = search.run("cpu", groups=list(groups), program=program, seconds=1000.0, **more)
    return result | {"file": str(quick)}


# --- one process -----------------------------------------------------------------------------------------------------

SAYS_HALF = (
    "import sys\nprint('{\"ready\": true}', flush=True)\nfor line in sys.stdin:\n"
    "    sys.stdout.write('{\"half an'); sys.stdout.flush(); sys.exit('it fell')"
)


def test_an_answer_that_breaks_off_is_a_crash():
    asked = worker.Worker("cpu", program=(sys.executable, "-c", SAYS_HALF))
    for starts in (1, 2):
        assert asked.ask({}) == worker.Failure("crashes", "exit status 1: it fell")
        assert not asked.alive and asked.starts == starts


SAYS = "import sys\nprint('{\"ready\": true}', flush=True)\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()"


@pytest.mark.parametrize(
    "text", ["AcceleratorError: no", "CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal"]
)
def test_a_process_that_is_poisoned_is_replaced_whatever_it_answered(text):
    asked = worker.Worker("cpu", program=(sys.executable, "-c", SAYS))
    right = {"status": "ok", "reason": "", "samples": [[1.0], {"failed": "crashes", "reason": "ValueError: no"}]}
    assert asked.ask(right) == right and asked.alive
    assert asked.ask({"failed": "crashes", "reason": "ValueError: no"}) == worker.Failure("crashes", "ValueError: no")
    assert asked.alive
    assert asked.ask({"failed": "crashes", "reason": text}) == worker.Failure("crashes", text) and not asked.alive
    for answer in ({"status": "wrong", "reason": text}, {"samples": [[1.0], {"failed": "crashes", "reason": text}]}):
        assert asked.ask(answer) == answer and not asked.alive
    assert asked.starts == 3


def test_the_limits_are_those_of_the_moment(monkeypatch):
    asked = worker.Worker("cpu", program=(sys.executable, "-c", "print('{\"ready\": true}', flush=True); input(); input()"))
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 0.3)
    assert asked.ask({}) == worker.Failure("hangs", "no answer within 0 s")
    with worker.Pool("cpu", 1, (sys.executable, "-c", "print('{\"ready\": true}', flush=True); input(); input()")) as pool:
        assert pool.submit({}).result(20).status == "hangs"


def test_a_pool_that_is_left_leaves_no_process_behind(monkeypatch):
    """Also where one is begun at that moment."""
    begun = []
    original = worker._Process.__init__

    def slow(self, *arguments):
        begun.append(self)
        time.sleep(0.5)
        original(self, *arguments)

    monkeypatch.setattr(worker._Process, "__init__", slow)
    with worker.Pool("cpu", 1, (sys.executable, "-c", SAYS)) as pool:
        pool.submit({})
        waiting = pool.submit({})
        while not begun:
            time.sleep(0.01)
    assert waiting.cancelled()
    pool._threads[0].join(10)
    assert not pool._threads[0].is_alive() and begun[0]._process.poll() is not None


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", ["add", "round"])
def test_each_fault_costs_one_candidate(quick, spec, monkeypatch, during):
    faults = [{"direction": "forward", "rows": rows, "kind": kind, "during": [during]} for rows, kind in KINDS.items()]
    program = spec(*faults, costs={"7": 1.0, "else": 3.0})
    result = run(quick, monkeypatch, program, candidates=(1, 2, 3, 7, 4, 5, 6))
    assert statuses(result) == STATUS
    assert statuses(result, "backward") == dict.fromkeys(STATUS, "timed")
    assert result["dropped"] == {"crashes": 4, "hangs": 1, "out of memory": 1}
    assert rows_of(result) == {("soft_topk", "forward"): 7, ("soft_topk", "backward"): 7}
    said = reasons(result)
    assert "an illegal memory access" in said[1] and "an illegal memory access" in said[2]
    assert "exit status 3" in said[3] and "exit status -11" in said[4]
    assert "no answer within" in said[5] and "80.00 GiB" in said[6]


def test_a_fault_that_comes_late_costs_one_candidate_too(quick, spec, monkeypatch):
    """Two calls prepare it, and the first round is well."""
    program = spec({"direction": "forward", "rows": 1, "kind": "exits", "during": ["add", "round"], "after": 3})
    result = run(quick, monkeypatch, program)
    assert statuses(result) == {DEFAULT: "timed", 1: "crashes", 2: "timed", 3: "timed"}
    assert result["dropped"] == {"crashes": 1}
    assert None not in rows_of(result).values()


COSTS = {"1": 1.0, "2": 1.5, "3": 2.0, "else": 4.0}


def test_what_fails_its_proof_is_not_shipped_and_the_next_best_is(quick, spec, monkeypatch):
    program = spec(
        {"direction": "forward", "rows": 1, "kind": "wrong"},
        {"direction": "backward", "rows": 1, "kind": "wrong"},
        {"direction": "forward", "rows": 2, "kind": "exits", "during": ["prove"]},
        {"direction": "backward", "rows": 2, "kind": "illegal", "during": ["prove"]},
        costs=COSTS,
    )
    result = run(quick, monkeypatch, program)
    assert statuses(result) == {DEFAULT: "timed", 1: "wrong", 2: "crashes", 3: "timed"}
    assert statuses(result, "backward") == {DEFAULT: "timed", 1: "wrong", 2: "wrong", 3: "timed"}
    assert result["dropped"] == {"wrong": 3, "crashes": 1}
    assert "values" in reasons(result)[1] and "grad" in reasons(result, "backward")[1]
    assert "an illegal memory access" in reasons(result, "backward")[2]
    assert rows_of(result) == {("soft_topk", "forward"): 3, ("soft_topk", "backward"): 3}


def test_a_wrong_backward_costs_the_forward_nothing(quick, spec, monkeypatch):
    """Not even where nothing is left but the default."""
    program = spec(*({"direction": "backward", "rows": rows, "kind": "wrong"} for rows in (1, 2, 3, 4, 5)), costs=COSTS)
    result = run(quick, monkeypatch, program, candidates=(1, 2, 3, 4, 5))
    assert rows_of(result) == {("soft_topk", "forward"): 1, ("soft_topk", "backward"): DEFAULT}
    assert set(statuses(result).values()) == {"timed"}
    assert [statuses(result, "backward")[rows] for rows in (1, 2, 3, DEFAULT)] == ["wrong"] * 3 + ["timed"]


def test_a_proof_that_hangs(quick, spec, monkeypatch):
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 15.0)
    program = spec({"direction": "forward", "rows": 1, "kind": "hangs", "during": ["prove"]}, costs=COSTS)
    result = run(quick, monkeypatch, program)
    assert statuses(result)[1] == "hangs" and result["dropped"] == {"hangs": 1}
    assert rows_of(result) == {("soft_topk", "forward"): 2, ("soft_topk", "backward"): 1}


@pytest.mark.parametrize("kind, status", [("exits", "crashes"), ("memory", "out of memory")])
def test_a_default_that_fails_leaves_its_keys_out_and_no_others(quick, spec, monkeypatch, kind, status):
    program = spec({"op": "soft_topk", "direction": "forward", "rows": DEFAULT, "kind": kind}, costs=COSTS)
    result = run(quick, monkeypatch, program, groups=(GROUP, OTHER), candidates=(1, 2))
    assert rows_of(result) == {
        ("soft_topk", "forward"): None,
        ("soft_topk", "backward"): None,
        ("coordinate_descent", "forward"): 1,
        ("coordinate_descent", "backward"): 1,
    }
    assert statuses(result)[DEFAULT] == status
    assert set(statuses(result, op="coordinate_descent").values()) == {"timed"}
    assert result["dropped"][status] >= 1


def test_a_compiler_that_crashes_and_a_poisoned_proof_cost_one_candidate_each(quick, spec, monkeypatch):
    """As on a GPU: processes that compile and prove, and one that times."""

    def processes(self, stack):
        pool = stack.enter_context(worker.Pool("cpu", 1, self.program))
        asked = worker.Worker("cpu", program=self.program)
        stack.callback(asked.stop)
        return pool, timer.Timer(asked, "cpu", self.seed, self.plan.sample_us)

    compiles = search._Search.compile

    def compile(self, track, config, priority):
        monkeypatch.setattr(self, "backend", "triton")
        try:
            return compiles(self, track, config, priority)
        finally:
            monkeypatch.setattr(self, "backend", "cpu")

    monkeypatch.setattr(search._Search, "_processes", processes)
    monkeypatch.setattr(search._Search, "compile", compile)
    program = spec(
        {"direction": "forward", "rows": 1, "kind": "exits", "during": ["compile"]},
        {"direction": "forward", "rows": 2, "kind": "illegal", "during": ["prove"]},
        costs=COSTS,
    )
    result = run(quick, monkeypatch, program)
    assert statuses(result) == {DEFAULT: "timed", 1: "crashes", 2: "wrong", 3: "timed"}
    assert result["dropped"] == {"crashes": 1, "wrong": 1}
    assert "exit status 4" in reasons(result)[1]
    assert rows_of(result) == {("soft_topk", "forward"): 3, ("soft_topk", "backward"): 1}


# --- killed and run again --------------------------------------------------------------------------------------------


def begin(spec_program, output: Path) -> subprocess.Popen:
    argv = [sys.executable, "-P", str(PROGRAM), "search", spec_program[-1]]
    with open(output.with_suffix(".err"), "w") as errors:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ))


def journal_lines(path: Path) -> list[tuple[str, str]]:
    """Kind and name of what stands there, but for the time that was spent, which is noted anew with every answer."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    return [(kind, name) for kind, name, _ in map(json.loads, lines) if kind != "spent"]


MEASURED = ("samples", "final", "proved")


def measured(requests: list[dict]) -> int:
    return sum(one["do"] in ("round", "prove") for one in requests)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_goes_on_and_repeats_one_measurement_at_most(quick, spec, asked, monkeypatch, tmp_path, seed):
    groups = GROUPS[:2]
    program = spec(costs=COSTS, groups=groups, output=str(quick))
    path = journal.journal_path(quick)
    at = random.Random(seed).randrange(1, 14)
    running = begin(program, tmp_path / "one")
    try:
        until = time.monotonic() + 120
        while running.poll() is None and len(journal_lines(path)) < at and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        running.kill()
        running.communicate()
    time.sleep(0.5)  # the worker ends with what it was doing
    before, requests = journal_lines(path), asked()
    assert at <= len(before) == len(set(before))
    done = sum(kind in MEASURED for kind, _ in before)
    assert done <= measured(requests) <= done + 1
    (tmp_path / "log").unlink()
    # the journal stays, to be looked at
    monkeypatch.setattr(journal.Journal, "remove", journal.Journal.close)
    result = run(quick, monkeypatch, program, groups=groups)
    after = journal_lines(path)
    assert after[: len(before)] == before and len(after) == len(set(after))
    assert measured(asked()) == sum(kind in MEASURED for kind, _ in after) - done
    assert rows_of(result) == {(group.op, direction): 1 for group in groups for direction in kernel_config.DIRECTIONS}
    assert len(json.loads(quick.read_text())["entries"]) == 4


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    served = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    yield served.port
    del served


@pytest.mark.parametrize("victim", [None, 0, 1])
def test_two_processes_share_a_run_and_one_may_die(quick, spec, asked, tmp_path, port, victim):
    costs = {"1": 2.0, "else": 8.0}
    more = {"groups": GROUPS, "output": str(quick)}
    programs = [spec(costs=costs, name=f"rank{rank}", crew=(rank, port, f"victim {victim}"), **more) for rank in (0, 1)]
    running = [begin(program, tmp_path / f"rank{rank}") for rank, program in enumerate(programs)]
    try:
        if victim is not None:
            path = journal.journal_path(quick, victim)
            until = time.monotonic() + 120
            while not journal_lines(path) and running[victim].poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(running[victim].pid, signal.SIGKILL)
        results = []
        for rank, process in enumerate(running):
            out, _ = process.communicate(timeout=200)
            if rank != victim:
                assert process.returncode == 0, (tmp_path / f"rank{rank}.err").read_text()
                results.append(json.loads(out))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    entries = json.loads(quick.read_text())["entries"]
    keys = {group.key(direction) for group in GROUPS for direction in kernel_config.DIRECTIONS}
    assert {Key(**one["key"]) for one in entries} == keys and len(entries) == len(keys)
    for result in results:
        assert [one["config"] for one in result["keys"]] == [one["config"] for one in results[0]["keys"]]
        assert {Key(**one["key"]) for one in result["keys"]} == keys and result["dropped"] == {}
    assert not list(tmp_path.glob(".*.jsonl"))
    tuned = Counter((one["op"], one["n"]) for one in asked() if one["do"] == "prove")
    assert set(tuned) == {(group.op, group.n) for group in GROUPS}
    if victim is None:
        assert set(tuned.values()) == {1}
        assert len({one["process"] for one in asked()}) == 2
