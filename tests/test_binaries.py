"""What the compiler makes of a candidate; and on a GPU, that a kernel which crashes or never ends costs one candidate."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coordroute.autotune import binaries, search, space, timer, worker
from coordroute.autotune.binaries import Compiled
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key

CPU = torch.device("cpu")
KEY = Key("soft_topk", "forward", "float32", 1024, 1024)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("direction", kernel_config.DIRECTIONS)
def test_on_a_cpu_nothing_is_compiled(direction, monkeypatch):
    monkeypatch.setattr(binaries, "raw", lambda *rest: pytest.fail("a kernel was asked for"))
    key = KEY._replace(direction=direction)
    for config in space.candidates(key, "cpu", "full"):
        assert binaries.compiled(CPU, key, config, False) == Compiled("ok")
    config = kernel_config.heuristic(key, "cpu")
    assert binaries.prepare(CPU, key.op, key.dtype, key.n, key.direction, config, 0) == 0


def test_an_answer_of_a_worker_is_what_it_was():
    found = Compiled("spills", "9 spilled at 255 registers", 255, 9, 0, 0.25, "a hash", 1.5)
    assert Compiled(**json.loads(json.dumps(found._asdict()))) == found
    assert Compiled(*worker.Failure("crashes", "no")) == Compiled("crashes", "no")


# --- on a GPU --------------------------------------------------------------------------------------------------------


def one_of(variant: str, key: Key):
    return next(config for config in space.candidates(key, "triton", "full") if config.variant == variant)


@needs_gpu
@pytest.mark.parametrize("op", kernel_config.OPS)
@pytest.mark.parametrize("direction", kernel_config.DIRECTIONS)
@pytest.mark.parametrize("variant, rows, n", [("resident", 1024, 1024), ("tiled", 1024, 8192), ("split", 4, 131072)])
def test_a_candidate_of_each_variant_compiles(op, direction, variant, rows, n):
    key = Key(op, direction, "float32", rows, n)
    config = one_of(variant, key)
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    found = binaries.compiled(device, key, config, True)
    assert (found.status, found.reason) == ("ok", "")
    assert 16 <= found.registers <= 255 and found.spills >= 0 and found.shared >= 0 and 0 < found.occupancy <= 1
    assert len(found.identity) == 64
    assert torch.cuda.memory_allocated() == before
    assert binaries.compiled(device, key, config, True).identity == found.identity


@needs_gpu
def test_the_identity_is_that_of_the_launch():
    device = torch.device("cuda", torch.cuda.current_device())
    plain = one_of("resident", KEY)
    first = binaries.compiled(device, KEY, plain, True)
    # a limit that the kernel does not come to makes no difference, another grid or number of warps does
    same = binaries.compiled(device, KEY, replace(plain, max_registers=255), True)
    assert same.identity == first.identity or first.registers > 200
    others = [
        binaries.compiled(device, KEY, replace(plain, num_warps=2 * plain.num_warps), True),
        binaries.compiled(device, KEY, replace(plain, rows_per_program=2 * plain.rows_per_program), True),
        binaries.compiled(device, KEY._replace(rows=4096), plain, True),
        binaries.compiled(device, KEY._replace(dtype="bfloat16"), plain, True),
    ]
    assert len({first.identity, *(one.identity for one in others)}) == 5


@needs_gpu
@pytest.mark.parametrize("kind, status, words", [("illegal", "crashes", "illegal"), ("endless", "hangs", "no answer within")])
@pytest.mark.parametrize("after", [0, 3])
def test_a_kernel_that_crashes_or_never_ends_costs_one_candidate(tmp_path, monkeypatch, kind, status, words, after):
    """With a real kernel, in the first call or in one that is timed to see how long it takes."""
    monkeypatch.setitem(timer.PREPARE_SECONDS, "cuda", 60.0 if kind == "illegal" else 30.0)
    monkeypatch.setattr(timer, "GRACE_SECONDS", 5.0)
    default = one_of("resident", KEY)
    # told apart by rows_per_program
    bad, good = replace(default, rows_per_program=4), replace(default, rows_per_program=2)
    assert default.rows_per_program not in (2, 4)
    fault = {"direction": "forward", "rows": 4, "kind": kind, "during": ["add"], "after": after}
    spec = tmp_path / "spec"
    spec.write_text(json.dumps({"log": str(tmp_path / "log"), "faults": [fault]}))
    program = (sys.executable, "-P", str(Path(__file__).with_name("faulty_worker.py")), "worker", str(spec))
    asked = worker.Worker("cuda", program=program)
    try:
        asks = timer.Timer(asked, "cuda", 0, 100.0)
        asks.open(search.label(KEY), KEY)
        begin = time.monotonic()
        samples, failures = asks.sample(search.label(KEY), [default, bad, good], 5)
        assert list(failures) == [bad] and failures[bad].status == status and words in failures[bad].reason
        assert {config: len(found) for config, found in samples.items()} == {default: 5, good: 5}
        assert asked.starts == 2 and time.monotonic() - begin < 200
        # the process that is there now is well
        again, failed = asks.sample(search.label(KEY), [default, good], 3)
        assert len(again) == 2 and not failed and asked.starts == 2
    finally:
        asked.stop()
