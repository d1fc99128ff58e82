"""The benchmark: our operators beside what a person would otherwise call, on fixed shapes, all in one run.

Device work is timed, not the host: see ``timing.py``. For each shape and dtype all implementations run interleaved.
A forward runs without autograd. A backward is ``torch.autograd.grad`` on a retained graph, captured into a CUDA graph
on a GPU, so that only its kernels count.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from ..kernels import config as kernel_config
from . import device as devices
from . import store, timing
from .proof import PUBLISHED, one_line

Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

GPU_SHAPES = (
    (1024, 8192),
    (4096, 2048),
    (65536, 256),
    (32, 8192),
    (8, 1024),
    (4, 131072),
    (1, 1048576),
)
CPU_SHAPES = ((256, 512), (64, 4096), (8, 1024), (2, 65536))

COMPILED_SHAPES = ((1024, 8192), (4, 131072), (64, 4096))
"""torch.compile of the published recurrence takes a while for each shape: it is measured at these."""

COMPILE_SECONDS = 40.0
GPU_SECONDS, CPU_SECONDS = 240.0, 55.0
PEER_SEGMENTS = 2
"""checkpoint_segments of the peer's kernel."""

EXACT_EPS = PUBLISHED.eps

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Contender:
    """One implementation of one operator.

    Attributes:
        op: what it computes, for the reader.
        implementation: whose it is.
        make: gets (rows, n) and returns the function of the scores; may raise ImportError or any other error, which
            becomes the row's status.
        dtypes: in which it is measured.
        backward: whether its backward is measured too.
        footprint: memory of one call as a multiple of the scores', to size the rotation.
        n_iters: for the record.
        shapes: the only shapes at which it is measured; None is all.
        compiles: it is compiled by torch.compile: slow to start, and bounded as a whole.
        devices: device types on which it runs.
    """

    op: str
    implementation: str
    make: Callable[[int, int, torch.device], Call]
    dtypes: tuple[str, ...] = ("float32",)
    backward: bool = True
    footprint: int = 2
    n_iters: int | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def k_of(n: int) -> float:
    """The budget of every measurement: 9/64 of the row."""
    return PUBLISHED.k(n)


# --- the contenders --------------------------------------------------------------------------------------------------


def _impl(device: torch.device) -> str:
    from ..kernels import ops

    return ops.default_impl(device)


def _our_soft_topk(rows: int, n: int, device: torch.device) -> Call:
    from ..kernels import ops

    impl, k = _impl(device), k_of(n)
    return lambda s: ops.soft_topk_rows(s, k, EXACT_EPS, None, impl)


def _our_descent(rows: int, n: int, device: torch.device) -> Call:
    from ..kernels import ops

    impl, k, p = _impl(device), k_of(n), PUBLISHED
    return lambda s: ops.coordinate_descent_rows(s, k, None, p.n_iters, p.eps, p.eps_init, p.eps_decay, None, impl)


def _softmax(rows: int, n: int, device: torch.device) -> Call:
    return lambda s: torch.softmax(s, dim=-1)


def _topk(rows: int, n: int, device: torch.device) -> Call:
    k = max(1, n // 8)
    return lambda s: torch.topk(s, k, dim=-1).values


def _copy(rows: int, n: int, device: torch.device) -> Call:
    return lambda s: s.clone()


def _published(rows: int, n: int, device: torch.device) -> Call:
    from ..reference.oracles import coordinate_descent_torch

    p = PUBLISHED
    k = torch.full((rows,), k_of(n), device=device)
    return lambda s: coordinate_descent_torch(s, k, n_iters=p.n_iters, eps=p.eps, eps_init=p.eps_init, eps_decay=p.eps_decay)


def _compiled(rows: int, n: int, device: torch.device) -> Call:
    torch._dynamo.reset()
    return torch.compile(_published(rows, n, device), dynamic=False)


def _colt5(rows: int, n: int, device: torch.device) -> Call:
    import triton  # noqa: F401 - without it the peer's module ends the process
    from colt5_attention.triton_coor_descent import triton_coor_descent

    p = PUBLISHED
    k = torch.full((rows,), k_of(n), device=device)
    return lambda s: triton_coor_descent(
        s,
        n_iters=p.n_iters,
        k=k,
        eps=p.eps,
        eps_init=p.eps_init,
        eps_decay=p.eps_decay,
        checkpoint_segments=PEER_SEGMENTS,
    )


def _budget_bisect(rows: int, n: int, device: torch.device) -> Call:
    from entmax import budget_bisect

    budget = k_of(n)
    return lambda s: budget_bisect(s, budget=budget, dim=-1, n_iter=24)


def _installed(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def contenders(peers: bool) -> list[Contender]:
    """What is measured, with ``peers`` also other people's packages."""
    both, iters = ("float32", "bfloat16"), PUBLISHED.n_iters
    found = [
        Contender("copy", "copy", _copy, both, backward=False),
        Contender("softmax", "torch.softmax", _softmax, both),
        Contender("topk", "torch.topk", _topk, backward=False),
        Contender("soft_topk", "coordroute", _our_soft_topk, both),
        Contender("coordinate_descent", "coordroute", _our_descent, both, n_iters=iters),
        Contender("coordinate_descent", "eager published recurrence", _published, footprint=100, n_iters=iters),
        Contender(
            "coordinate_descent",
            "torch.compile of the published recurrence",
            _compiled,
            footprint=50,
            n_iters=iters,
            shapes=COMPILED_SHAPES,
            compiles=True,
        ),
    ]
    if peers:
        colt5 = f"colt5-attention {_installed('CoLT5-attention', 'colt5-attention')}"
        found += [
            Contender("coordinate_descent", colt5, _colt5, footprint=8, n_iters=iters, devices=("cuda",)),
            Contender("budget_sparsemax", f"entmax budget_bisect {_installed('entmax')}", _budget_bisect, footprint=20),
        ]
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


def run(
    device: torch.device | str | None = None,
    peers: bool = False,
    progress: Progress | None = None,
    *,
    shapes: tuple[tuple[int, int], ...] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measures every contender on every shape, forward and backward.

    Args:
        device: where; None is the GPU where there is one, else the CPU.
        peers: also measure other packages that are installed; one that is missing or fails is a row with its reason.
        progress: called with (total, done, text, seconds left or None).
        shapes: (rows, n) to measure; None is the fixed list of the device's kind.
        seconds: after this long what is left is recorded as skipped; None is 240 on a GPU and 55 on a CPU.

    Returns:
        The evidence as it goes into benchmark.json.
    """
    begin = time.monotonic()
    device = devices.as_device(device)
    # ours run as model code runs them: with the tuned configurations
    kernel_config.use_lookup(store.lookup)
    cuda = device.type == "cuda"
    if shapes is None:
        shapes = GPU_SHAPES if cuda else CPU_SHAPES
    bench = _Bench(device, contenders(peers), begin + (seconds or (GPU_SECONDS if cuda else CPU_SECONDS)))
    rounds = [(shape, dtype, direction) for shape in shapes for dtype in bench.dtypes for direction in _DIRECTIONS]
    results: list[dict[str, Any]] = []
    for done, (shape, dtype, direction) in enumerate(rounds):
        if progress is not None:
            spent = time.monotonic() - begin
            left = spent / done * (len(rounds) - done) if done else None
            progress(len(rounds), done, f"{shape[0]}x{shape[1]} {dtype} {direction}", left)
        results += bench.measure(*shape, dtype, direction)
    if progress is not None:
        progress(len(rounds), len(rounds), "done", 0.0)
    where = "CUDA graph replays between events" if cuda else "perf_counter around repeated calls"
    cold = f", inputs rotating over {timing.l2_bytes(device) >> 20} MiB of L2 and more" if cuda else ""
    return {
        "schema": 1,
        "command": "benchmark",
        "device": devices.describe(device),
        "versions": devices.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "method": f"{where}, interleaved in rotating order, normal scores{cold}; median and its 95 % interval",
        "settings": {
            "n_iters": PUBLISHED.n_iters,
            "eps": PUBLISHED.eps,
            "eps_init": PUBLISHED.eps_init,
            "eps_decay": PUBLISHED.eps_decay,
            "k": "9n/64; torch.topk: n/8",
        },
        "results": results,
    }


_DIRECTIONS = ("forward", "backward")


class _Bench:
    def __init__(self, device: torch.device, found: list[Contender], deadline: float) -> None:
        self.device, self.contenders, self.deadline = device, found, deadline
        self.dtypes = tuple(dict.fromkeys(dtype for contender in found for dtype in contender.dtypes))
        self.compile_seconds = 0.0
        self.calls: dict[tuple[str, str, int, int], Call | Exception] = {}

    def measure(self, rows: int, n: int, dtype: str, direction: str) -> list[dict[str, Any]]:
        """All contenders on one shape, dtype and direction, interleaved."""
        on_gpu = self.device.type == "cuda"
        results: list[dict[str, Any]] = []
        works: list[timing.Work] = []
        timed: list[dict[str, Any]] = []
        with _stream(self.device):
            for contender in self.contenders:
                if dtype not in contender.dtypes or (direction == "backward" and not contender.backward):
                    continue
                row = self.row(contender, direction, dtype, rows, n)
                results.append(row)
                reason = self.skips(contender, rows, n)
                if reason is None:
                    begin = time.monotonic()
                    try:
                        work = self.work(contender, direction, dtype, rows, n)
                        work.call(0)
                        if on_gpu:
                            torch.cuda.synchronize(self.device)
                    except Exception as error:
                        reason = one_line(error)
                    else:
                        works.append(work)
                        timed.append(row)
                    if contender.compiles:
                        self.compile_seconds += time.monotonic() - begin
                if reason is not None:
                    row["status"] = f"skipped: {reason}"
            samples, target = (21, 300.0) if on_gpu else (9, 2000.0)
            seconds = max(0.1, min(2.5, self.deadline - time.monotonic()))
            outcomes = timing.race(works, self.device, samples=samples, target_us=target, seconds=seconds)
        for row, outcome in zip(timed, outcomes, strict=True):
            if isinstance(outcome, timing.Timed):
                row.update(outcome.to_json())
            else:
                row["status"] = f"skipped: {one_line(outcome)}"
        works.clear()
        self.calls = {name: call for name, call in self.calls.items() if name[2:] == (rows, n)}
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return results

    def row(self, contender: Contender, direction: str, dtype: str, rows: int, n: int) -> dict[str, Any]:
        return {
            "op": contender.op,
            "implementation": contender.implementation,
            "direction": direction,
            "dtype": dtype,
            "rows": rows,
            "n": n,
            "k": max(1, n // 8) if contender.op == "topk" else k_of(n),
            "n_iters": contender.n_iters,
            "median_us": None,
            "ci_us": None,
            "samples": 0,
            "method": "",
            "status": "ok",
        }

    def skips(self, contender: Contender, rows: int, n: int) -> str | None:
        """Why a contender is left out here, or None."""
        if self.device.type not in contender.devices:
            return f"does not run on {self.device.type}"
        if contender.shapes is not None and (rows, n) not in contender.shapes:
            listed = ", ".join(f"{r}x{c}" for r, c in contender.shapes)
            return f"measured only at {listed}, since each shape is compiled"
        if contender.compiles and self.compile_seconds > COMPILE_SECONDS:
            return f"compiling took {self.compile_seconds:.0f} s so far, the limit is {COMPILE_SECONDS:.0f} s"
        if time.monotonic() > self.deadline:
            return "no time was left"
        return None

    def call(self, contender: Contender, rows: int, n: int) -> Call:
        name = (contender.op, contender.implementation, rows, n)
        if name not in self.calls:
            try:
                self.calls[name] = contender.make(rows, n, self.device)
            except Exception as error:
                self.calls[name] = error
        made = self.calls[name]
        if isinstance(made, Exception):
            raise made
        return made

    def work(self, contender: Contender, direction: str, dtype: str, rows: int, n: int) -> timing.Work:
        call = self.call(contender, rows, n)
        kind = getattr(torch, dtype)
        footprint = contender.footprint if direction == "backward" else 2
        size = footprint * rows * n * kind.itemsize
        sets = timing.input_sets(self.device, size)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal() -> torch.Tensor:
            return torch.randn(rows, n, generator=generator, device=self.device).to(kind)

        scores = [normal() for _ in range(sets)]
        if direction == "forward":
            return timing.Work(contender.implementation, _forward(call, scores), sets, size)
        for one in scores:
            one.requires_grad_()
        with torch.enable_grad():
            outputs = [call(one) for one in scores]
        grads = [normal() for _ in range(sets)]
        return timing.Work(contender.implementation, _backward(outputs, scores, grads), sets, size)


def _forward(call: Call, scores: list[torch.Tensor]) -> Callable[[int], Any]:
    def forward(i: int) -> torch.Tensor:
        with torch.no_grad():
            return call(scores[i])

    return forward


def _backward(outputs: list[torch.Tensor], scores: list[torch.Tensor], grads: list[torch.Tensor]) -> Callable[[int], Any]:
    def backward(i: int) -> Any:
        return torch.autograd.grad(outputs[i], scores[i], grads[i], retain_graph=True)

    return backward


@contextlib.contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    """A side stream for preparation and timing alike: autograd runs a backward on the stream of its forward."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(device).wait_stream(stream)
