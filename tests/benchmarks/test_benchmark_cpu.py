"""Timings with pytest-benchmark, to compare two checkouts: `pytest tests/benchmarks --benchmark-autosave`.

Not collected by `make test`, and never a verdict: a figure here neither passes nor fails.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra dev")

from coordroute.autotune import device as devices
from coordroute.autotune import store
from coordroute.kernels import config as kernel_config
from coordroute.kernels import ops
from coordroute.kernels.config import LaunchConfig

DEVICE = devices.default_device()
SHAPES = [(256, 512), (64, 4096), (4, 65536)]


def synchronized(function):
    if DEVICE.type != "cuda":
        return function

    def call():
        result = function()
        torch.cuda.synchronize()
        return result

    return call


def soft_topk(scores):
    return ops.soft_topk_rows(scores, 9 * scores.shape[-1] / 64, 0.03, None, ops.default_impl(DEVICE))


def coordinate_descent(scores):
    k = 9 * scores.shape[-1] / 64
    return ops.coordinate_descent_rows(scores, k, None, 20, 0.03, 4.0, 0.7, None, ops.default_impl(DEVICE))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize(
    "operator",
    [soft_topk, coordinate_descent, lambda s: torch.softmax(s, -1)],
    ids=["soft_topk", "coordinate_descent", "softmax"],
)
def test_forward(benchmark, operator, shape):
    scores = torch.randn(shape, device=DEVICE)
    benchmark(synchronized(lambda: operator(scores)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("operator", [soft_topk, coordinate_descent], ids=["soft_topk", "coordinate_descent"])
def test_forward_and_backward(benchmark, operator, shape):
    scores = torch.randn(shape, device=DEVICE, requires_grad=True)
    grad = torch.randn(shape, device=DEVICE)
    benchmark(synchronized(lambda: torch.autograd.grad(operator(scores), scores, grad)))


def test_lookup(benchmark, tmp_path, monkeypatch):
    """A hit in the process's memory: the goal is under a microsecond."""
    key = kernel_config.Key("soft_topk", "forward", "float32", 256, 512)
    store.reload()
    monkeypatch.setattr(store, "_said", {f"device {devices.identity(DEVICE).name}"})
    store.lookup(DEVICE, key)
    monkeypatch.setitem(store._answers[DEVICE], key, LaunchConfig("eager", rows_per_program=1))
    benchmark(store.lookup, DEVICE, key)
    store.reload()


def test_import_of_the_store(benchmark):
    """The time that `import coordroute` adds to importing torch, in a process of its own."""
    import subprocess
    import sys

    code = "import time, torch; t = time.perf_counter(); import coordroute; print(time.perf_counter() - t)"
    found = benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, check=True), rounds=3)
    assert float(found.stdout) > 0
