"""Processes of one tuning run share the work through a store, whoever dies. Real processes, without a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from coordroute.autotune import crew
from coordroute.autotune.crew import Crew
from torch.distributed import TCPStore

WORKER = """
import json, os, sys, time
from coordroute.autotune.crew import Crew

count, held = int(sys.argv[1]), int(sys.argv[2])     # rank 1 stops at the item that it is to hold
with Crew.from_environment(patience=2.0 if held >= 0 else 20.0, timeout=20.0) as crew:
    crew.agree("the run", json.dumps({"count": count}))
    while not all(crew._has(f"rank/{rank}") for rank in range(crew.world_size)):   # so that each has a share
        time.sleep(0.01)
    while (item := crew.claim(count)) is not None:
        print("claimed", item, flush=True)
        if crew.rank == 1 and item >= held >= 0:
            time.sleep(60)
        time.sleep(0.05)
        crew.finish(item, json.dumps({"item": item, "rank": crew.rank, "local_rank": crew.local_rank}))
    print("results", json.dumps([json.loads(text) for text in crew.results(count)]), flush=True)
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a store that this process serves, as the agent of a launcher does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    yield store.port
    del store


@pytest.fixture
def join(port, request) -> Iterator:
    """Joins crews within this process, each rank with a connection of its own; all of one test are of one run."""
    with contextlib.ExitStack() as stack:

        def join(rank: int, world_size: int = 2, **options) -> Crew:
            options = {"prefix": request.node.name, "patience": 0.6, "timeout": 10.0} | options
            return stack.enter_context(Crew(rank, world_size, rank, "127.0.0.1", port, **options))

        yield join


def variables(rank: int, world_size: int, port: int, run: str = "a run", agent: bool = True) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": str(agent),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def workers(
    world_size: int, port: int, run: str, count: int, held: int = -1, agent: bool = True
) -> Iterator[list[subprocess.Popen]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(count), str(held)],
            env=os.environ | variables(rank, world_size, port, run, agent),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def output(process: subprocess.Popen) -> tuple[list[int], list[dict]]:
    """What a worker claimed, and all results as it saw them."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    claimed = [int(line.split()[1]) for line in out.splitlines() if line.startswith("claimed")]
    (results,) = [json.loads(line.partition(" ")[2]) for line in out.splitlines() if line.startswith("results")]
    return claimed, results


# --- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_is_no_crew(environment):
    assert Crew.from_environment(environment) is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("WORLD_SIZE", "0", "a whole number from 1"),
        ("WORLD_SIZE", "two", "a whole number from 1"),
        ("RANK", "2", "a whole number from 0 to 1"),
        ("RANK", "-1", "a whole number from 0 to 1"),
        ("RANK", "", "a whole number from 0 to 1"),
        ("LOCAL_RANK", "1.0", "a whole number from 0 to 1"),
        ("LOCAL_RANK", None, "a whole number from 0 to 1"),
        ("MASTER_ADDR", " ", "the name or the address of a host"),
        ("MASTER_ADDR", None, "the name or the address of a host"),
        ("MASTER_PORT", "65536", "a whole number from 1 to 65535"),
        ("MASTER_PORT", None, "a whole number from 1 to 65535"),
        ("TORCHELASTIC_USE_AGENT_STORE", "1", "True or False"),
        ("TORCHELASTIC_RESTART_COUNT", "x", "a whole number from 0"),
    ],
)
def test_a_bad_variable_is_named_with_what_is_allowed(name, value, allowed):
    environment = variables(0, 2, 1)
    del environment[name]
    came = "not set"
    if value is not None:
        environment[name], came = value, repr(value)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} is {came}; allowed is {allowed}')}$"):
        Crew.from_environment(environment)


def test_runs_and_restarts_do_not_mix(port):
    environment = variables(1, 2, port, "a run that restarts")
    for change in ({}, {"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "another"}):
        with Crew.from_environment(environment | change) as member:
            assert (member.rank, member.world_size, member.local_rank) == (1, 2, 1)
            assert member.claim(1) == 0
            member.finish(0, json.dumps(change))
            assert json.loads(member.results(1)[0]) == change


# --- within one process ----------------------------------------------------------------------------------------------


def test_items_are_claimed_in_order_and_once(join):
    first, second = join(0), join(1)
    assert [first.claim(4), second.claim(4)] == [0, 1]
    with pytest.raises(RuntimeError, match="rank 0 holds item 0"):
        first.claim(4)
    second.finish(1, '"one"')
    second.finish(2, '"of an earlier run"')
    assert second.claim(4) == 3
    with pytest.raises(RuntimeError, match="2 of 4 items are not finished yet, the first of them is item 0"):
        first.results(4)
    first.finish(0, '"nil"')
    second.finish(3, '"three"')
    assert first.claim(4) is None and second.claim(4) is None
    assert first.results(4) == second.results(4) == ['"nil"', '"one"', '"of an earlier run"', '"three"']
    assert join(0).claim(0) is None


def test_the_first_result_stays(join):
    first, second = join(0), join(1)
    assert first.claim(1) == 0
    second.finish(0, '"second"')
    first.finish(0, '"first"')
    assert first.claim(1) is None
    assert first.results(1) == second.results(1) == ['"second"']


@pytest.mark.parametrize(
    ("item", "result", "message"), [(-1, "{}", "item is -1"), (0, "", "has 0 bytes"), (0, "x" * 2**23, "bytes")]
)
def test_a_result_that_cannot_be_stored_is_refused(join, item, result, message):
    member = join(0)
    with pytest.raises(ValueError, match=message):
        member.finish(item, result)
    member.finish(0, "é" * (crew.MAX_RESULT_BYTES // 2))
    assert len(member.results(1)[0]) == crew.MAX_RESULT_BYTES // 2


def test_who_leaves_gives_its_item_back_at_once(join):
    first, second = join(0, patience=60.0), join(1, patience=60.0)
    assert first.claim(1) == 0
    first.close()
    first.close()
    assert second.claim(1) == 0
    with pytest.raises(RuntimeError, match="rank 0 has left"):
        first.claim(1)


def test_who_was_held_for_dead_and_comes_back_changes_nothing(join, monkeypatch):
    first, second = join(0), join(1)
    assert first.claim(2) == 0
    monkeypatch.setattr(first, "_beat", lambda store: None)
    began = time.monotonic()
    assert second.claim(2) == 1
    second.finish(1, '"second"')
    assert second.claim(2) == 0 and time.monotonic() - began > 0.6
    monkeypatch.undo()
    second.finish(0, '"second"')
    first.finish(0, '"first"')
    assert first.claim(2) is None
    assert first.results(2) == ['"second"'] * 2


def test_a_holder_that_died_between_result_and_claim_is_not_repeated(join, monkeypatch):
    first, second = join(0), join(1)
    assert first.claim(1) == 0
    monkeypatch.setattr(first, "_mark_done", lambda item: None)
    first.finish(0, '"first"')
    first.close()
    assert second.claim(1) is None and second.results(1) == ['"first"']


def test_a_rank_that_was_started_anew_is_another_process(join, monkeypatch):
    dead = join(0)
    assert dead.claim(1) == 0
    monkeypatch.setattr(dead, "_beat", lambda store: None)
    assert join(0).claim(1) == 0


def test_differing_ranks_are_told_what_differs(join):
    members = [join(rank, 3) for rank in range(3)]
    members[1].agree("the device", json.dumps({"name": "one", "sm_count": 132, "driver": "1"}))
    members[1].agree("the device", json.dumps({"name": "one", "sm_count": 132, "driver": "1"}))
    for rank in (0, 2):
        with pytest.raises(RuntimeError, match=f"rank {rank} and rank 1 of this run differ in the device: sm_count") as raised:
            members[rank].agree("the device", json.dumps({"name": "one", "sm_count": 114, "driver": "1"}))
        assert "sm_count is 114 here and 132 on rank 1" in str(raised.value) and "driver" not in str(raised.value)
    members[0].agree("the effort", "quick")
    with pytest.raises(RuntimeError, match="differ in the effort: it is 'full' here and 'quick' on rank 0"):
        members[1].agree("the effort", "full")


def test_no_store_within_the_time_limit_is_said(monkeypatch):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 could not reach the store of its tuning run at 127\.0\.0\.1:\d+ \(.*\)$"):
        Crew(1, 2, 1, "127.0.0.1", free_port(), timeout=1.0)
    assert time.monotonic() - began < 8.0
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"without torch\.distributed"):
        Crew(1, 2, 1, "127.0.0.1", 1)


# --- with processes --------------------------------------------------------------------------------------------------


def test_all_items_are_done_once_and_a_killed_process_returns_its_own(port):
    with workers(3, port, "one is killed", count=40, held=5) as processes:
        victim, before = processes[1], []
        while not before or before[-1] < 5:
            before.append(int(victim.stdout.readline().split()[1]))
        os.kill(victim.pid, signal.SIGKILL)
        claimed, results = zip(*(output(processes[rank]) for rank in (0, 2)), strict=True)
    assert results[0] == results[1] and [result["item"] for result in results[0]] == list(range(40))
    assert sorted(claimed[0] + claimed[1] + before) == sorted([*range(40), before[-1]])
    assert all(mine for mine in claimed)
    for rank, mine in ((0, claimed[0]), (2, claimed[1]), (1, before[:-1])):
        assert [result["item"] for result in results[0] if result["rank"] == rank] == sorted(mine)


def test_rank_0_serves_until_the_others_have_left():
    with workers(2, free_port(), "rank 0 serves", count=20, agent=False) as processes:
        claimed, results = zip(*map(output, processes), strict=True)
    assert sorted(claimed[0] + claimed[1]) == list(range(20))
    assert results[0] == results[1]


def test_a_store_that_hangs_or_is_gone_is_said_in_time():
    serve = (
        "import time; from torch.distributed import TCPStore; "
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); print(store.port, flush=True); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        members = [Crew(rank, 2, rank, "127.0.0.1", port, timeout=2.0) for rank in range(2)]
        assert members[0].claim(1) == 0
        os.kill(server.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(server.pid, os.WUNTRACED)[1])  # until then its thread may still answer
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^rank 0 lost the store of its tuning run at .* \(no answer within 2 s\)$"):
            members[0].finish(0, "{}")
        assert 1.0 < time.monotonic() - began < 6.0
        server.kill()
        server.wait()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^rank 1 lost the store of its tuning run at 127\.0\.0\.1:\d+ \(.*\)$") as raised:
            members[1].claim(1)
        assert "\n" not in str(raised.value)
        for member in members:
            member.close()
        assert time.monotonic() - began < 4.0
    finally:
        server.kill()
        server.communicate()


def test_with_torchrun(tmp_path: Path):
    script = tmp_path / "work.py"
    script.write_text(WORKER, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in variables(0, 2, 1)} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--log-dir={tmp_path}", "--redirects=3"]
    command += [f"--master-port={free_port()}", str(script), "12", "-1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    outputs = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.rglob("stdout.log"))]
    claimed = sorted(int(line.split()[1]) for text in outputs for line in text.splitlines() if line.startswith("claimed"))
    assert claimed == list(range(12))
    first, second = (next(line for line in text.splitlines() if line.startswith("results")) for text in outputs)
    assert first == second
