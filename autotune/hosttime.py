"""How long the host is busy with one eager call: ours beside the least that a Triton operator with a gradient can cost.

A small call takes the host longer than the device, and then this is what a model pays. The yardstick is a bare
``torch.autograd.Function`` that launches one trivial Triton kernel each way and saves nothing.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..kernels.config import Key
from . import store
from .proof import PUBLISHED
from .timing import Timed, paired_ratio

SHAPE = (8, 1024)
"""Small enough that the device waits for the host, not the other way round."""

CALLS = 50
"""Calls a sample: few enough that their launches fit the device's queue (about 1000), so that the host never waits for it."""

SAMPLES = 101

LOOKUPS = 20_000


def measure(device: torch.device | str) -> dict[str, Any] | None:
    """Host time of one eager forward and backward on 8x1024 float32 scores, in µs.

    A sample enqueues ``CALLS`` calls and ends when the last one has returned; the device is awaited outside of it. The three
    are sampled in rotating order, and a ratio is taken sample by sample.

    Returns:
        ``bare_us``, ``soft_topk_us`` and ``coordinate_descent_us``, each with its 95 % interval ``…_ci_us``;
        ``soft_topk_ratio`` and ``coordinate_descent_ratio`` to the bare one, with ``…_ratio_ci``; ``samples`` and ``method``.
        None on a CPU, where a call works in the calling thread and there is no host time apart from it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return _compare(_functions(), device, torch.cuda.synchronize)


def lookup(device: torch.device | str, keys: Sequence[Key]) -> dict[str, Any]:
    """What choosing a configuration costs a call, in ns, and what ``import coordroute`` adds to importing torch, in ms.

    A lookup is that of a key which was looked up before; medians over all keys in turn, the reading of the clock taken off.

    Args:
        device: whose configurations serve.
        keys: what is looked up; at least one.

    Returns:
        ``lookup_ns``, ``import_ms`` and ``samples``. ``import_ms`` is None where another Python could not be started.
    """
    device = torch.device(device)
    for key in keys:
        store.lookup(device, key)
    spent, clock = [], []
    for i in range(LOOKUPS):
        key = keys[i % len(keys)]
        begin = time.perf_counter_ns()
        store.lookup(device, key)
        between = time.perf_counter_ns()
        spent.append(between - begin)
        clock.append(time.perf_counter_ns() - between)
    return {
        "lookup_ns": max(0, round(statistics.median(spent) - statistics.median(clock))),
        "import_ms": _import_ms(),
        "samples": LOOKUPS,
    }


_IMPORT = "import time, torch; begin = time.perf_counter(); import coordroute; print(1e3 * (time.perf_counter() - begin))"


def _import_ms() -> float | None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command, started = [sys.executable, "-c", _IMPORT], list[subprocess.Popen[bytes]]()
    try:
        # side by side: most of the time goes into torch, which is not counted
        for _ in range(3):
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        found = [float(one.communicate(timeout=120)[0]) for one in started]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    finally:
        for one in started:
            one.kill()
            one.wait()
    return round(statistics.median(found), 2)


def _functions() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    from .. import router

    p = PUBLISHED
    k, schedule = p.k(SHAPE[1]), asdict(p)
    return {
        "bare": _bare(),
        "soft_topk": lambda scores: router.soft_topk(scores, k, eps=p.eps),
        "coordinate_descent": lambda scores: router.coordinate_descent(scores, k, **schedule),
    }


def _bare() -> Callable[[torch.Tensor], torch.Tensor]:
    import triton
    import triton.language as tl

    @triton.jit
    def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, 2.0 * tl.load(x_ptr + at, mask=at < n), mask=at < n)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        n = x.numel()
        double[(-(-n // 1024),)](x, y, n, BLOCK=1024)
        return y

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return doubled(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return doubled(grad)

    return Double.apply


def _compare(
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    device: torch.device,
    synchronize: Callable[[], None],
    samples: int = SAMPLES,
) -> dict[str, Any]:
    scores = torch.randn(SHAPE, device=device).requires_grad_()
    grad = torch.randn(SHAPE, device=device)

    def sample(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.autograd.grad(function(scores), scores, grad)
        return (time.perf_counter() - start) / CALLS * 1e6

    method = f"{CALLS} eager calls enqueued, host clock"
    timed = {name: Timed([], method) for name in functions}
    names = list(functions)
    with _no_collection():
        for function in functions.values():
            sample(function)  # compiles and warms up
        for turn in range(samples):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                timed[name].samples.append(sample(functions[name]))
    synchronize()
    result: dict[str, Any] = {"samples": samples, "method": method}
    for name, times in timed.items():
        result[f"{name}_us"] = round(times.median_us, 3)
        result[f"{name}_ci_us"] = [round(bound, 3) for bound in times.ci_us]
        if name != "bare":
            ratio, *interval = paired_ratio(times, timed["bare"])
            result[f"{name}_ratio"] = round(ratio, 3)
            result[f"{name}_ratio_ci"] = [round(bound, 3) for bound in interval]
    return result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection would fall into one sample and not the other."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
