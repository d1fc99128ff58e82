"""The benchmark: our operators beside what a person would otherwise call, on fixed shapes, all in one run.

Device work is timed, not the host: see ``timing.py``. For each shape and dtype all implementations run interleaved.
A forward runs without autograd. A backward is ``torch.autograd.grad`` on a retained graph, captured into a CUDA graph
on a GPU, so that only its kernels count. What a run says to the list of targets (``targets.py``) is part of the evidence;
besides times that is the memory kept for the backward, the host time of a call, and a short race on two cores of the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from . import device as devices
from . import hosttime, targets, timing
from .proof import PUBLISHED, one_line

Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

Shape = tuple[int, int]

GPU_SHAPES: tuple[Shape, ...] = (
    (1024, 8192),
    (4096, 2048),
    (1024, 16384),
    (65536, 256),
    (8, 1024),
    (16, 4096),
    (32, 8192),
    (4, 131072),
    (1, 1048576),
    (1, 16777216),
)
CPU_SHAPES: tuple[Shape, ...] = ((32, 8192), (256, 512), (64, 4096), (8, 1024), (2, 65536))

COMPILED_SHAPES: tuple[Shape, ...] = ((1024, 8192), (4, 131072), (64, 4096))
"""torch.compile of the published recurrence takes a while for each shape: it is measured at these."""

PEER_SHAPES: tuple[Shape, ...] = ((1024, 8192), (32, 8192), (4, 131072), *CPU_SHAPES)
"""Where what takes milliseconds a call is measured: a few shapes of each kind."""

TOPK_SHAPES: tuple[Shape, ...] = (*PEER_SHAPES, (65536, 256), (1, 1048576))

COMPILE_SECONDS = 40.0
GPU_SECONDS, CPU_SECONDS = 160.0, 60.0
ASIDE_SECONDS = 25.0
"""Kept free of a GPU's time for what is measured beside the times of kernels."""

CALL_SECONDS = {"cuda": 0.25, "cpu": 5.0}
"""A contender of which one call takes longer than this is left out."""

SAMPLES = {"cuda": (21, 1500.0), "cpu": (9, 2000.0)}
"""Rounds, and microseconds that one sample lasts at least. The latter is long enough for a call that the host takes 0.3 ms to
submit to be captured several times into its graph, so that inputs rotate."""

PEER_SEGMENTS = 2
"""checkpoint_segments of the peer's kernel."""

LONG_ITERS, LONG_EPS = 50, 0.1
"""coordinate_descent without eps-scaling: a constant eps, and as many more iterations."""

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
        shapes: the only shapes of the fixed lists at which it is measured; None is all. A shape of neither list, which
            somebody asks for, is measured all the same.
        compiles: it is compiled by torch.compile: slow to start, and bounded as a whole. It is measured at ``shapes`` alone.
        devices: device types on which it runs.
    """

    op: str
    implementation: str
    make: Callable[[int, int, torch.device], Call]
    dtypes: tuple[str, ...] = ("float32",)
    backward: bool = True
    footprint: int = 2
    n_iters: int | None = None
    shapes: tuple[Shape, ...] | None = None
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


def _our_long_descent(rows: int, n: int, device: torch.device) -> Call:
    from ..kernels import ops

    impl, k = _impl(device), k_of(n)
    return lambda s: ops.coordinate_descent_rows(s, k, None, LONG_ITERS, LONG_EPS, LONG_EPS, 1.0, None, impl)


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


def contenders(peers: bool, only: Sequence[str] | None = None, kind: str = "cuda") -> list[Contender]:
    """What is measured on a kind of device, with ``peers`` also other people's packages, with ``only`` no other operators."""
    both, iters = ("float32", "bfloat16"), PUBLISHED.n_iters
    eager, descent = targets.EAGER.implementation, "coordinate_descent"
    found = [
        Contender("copy", "copy", _copy, both, backward=False),
        Contender("softmax", "torch.softmax", _softmax, both),
        Contender("topk", "torch.topk", _topk, backward=False, shapes=TOPK_SHAPES),
        Contender("soft_topk", "coordroute", _our_soft_topk, both),
        Contender(descent, "coordroute", _our_descent, both, n_iters=iters),
        Contender(descent, eager, _published, footprint=100, n_iters=iters, shapes=PEER_SHAPES),
        Contender(
            descent,
            "torch.compile of the published recurrence",
            _compiled,
            footprint=50,
            n_iters=iters,
            shapes=COMPILED_SHAPES,
            compiles=True,
        ),
    ]
    if kind == "cuda":
        where = targets.shapes_of(targets.DESCENT_50)
        found.insert(5, Contender(targets.LONG, "coordroute", _our_long_descent, both, n_iters=LONG_ITERS, shapes=where))
    else:
        where = targets.shapes_of(targets.EAGER, "cpu")
        found.append(Contender(descent, eager, _published, ("bfloat16",), footprint=100, n_iters=iters, shapes=where))
    if peers:
        colt5 = f"{targets.COLT5.implementation} {_installed('CoLT5-attention', 'colt5-attention')}"
        found += [
            Contender(descent, colt5, _colt5, both, footprint=8, n_iters=iters, shapes=PEER_SHAPES, devices=("cuda",)),
            Contender(
                "budget_sparsemax",
                f"entmax budget_bisect {_installed('entmax')}",
                _budget_bisect,
                footprint=20,
                shapes=PEER_SHAPES,
            ),
        ]
    return [contender for contender in found if only is None or contender.op.split()[0] in only]


OPS = ("soft_topk", "coordinate_descent", "copy", "softmax", "topk", "budget_sparsemax")
"""What ``only`` may name: the operators of the contenders."""


# --- the run ---------------------------------------------------------------------------------------------------------


def run(
    device: torch.device | str | None = None,
    peers: bool = False,
    progress: Progress | None = None,
    *,
    shapes: tuple[Shape, ...] | None = None,
    only: Sequence[str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measures every contender on every shape, forward and backward, and says which targets are met.

    Args:
        device: where; None is the GPU where there is one, else the CPU.
        peers: also measure other packages that are installed; one that is missing or fails is a row with its reason.
        progress: called with (total, done, text, seconds left or None).
        shapes: (rows, n) to measure; None is the fixed list of the device's kind.
        only: the operators to measure, of ``OPS``; None is all.
        seconds: after this long what is left is recorded as skipped; None is 160 on a GPU and 60 on a CPU.

    Returns:
        The evidence as it goes into benchmark.json.

    Raises:
        ValueError: no such device or operator.
    """
    unknown = [op for op in only or () if op not in OPS]
    if unknown:
        raise ValueError(f"only names {unknown[0]!r}; allowed are {', '.join(OPS)}")
    begin = time.monotonic()
    device = devices.as_device(device)
    cuda = device.type == "cuda"
    wanted = shapes or (GPU_SHAPES if cuda else CPU_SHAPES)
    deadline = begin + (seconds or (GPU_SECONDS if cuda else CPU_SECONDS))
    asides = _asides(device, only, shapes)
    # all of the dtype that decides comes first: where the time does not suffice, the other goes short
    bench = _Bench(device, contenders(peers, only, device.type), deadline - (ASIDE_SECONDS if cuda and asides else 0.0))
    total, done = len(bench.dtypes) * len(wanted) * len(_DIRECTIONS) + len(asides), 0
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}

    def tell(text: str) -> None:
        if progress is not None:
            spent = time.monotonic() - begin
            progress(total, done, text, spent / done * (total - done) if done else None)

    for dtype in bench.dtypes:
        for shape in wanted:
            for direction in _DIRECTIONS:
                tell(f"{shape[0]}x{shape[1]} {dtype} {direction}")
                results += bench.measure(*shape, dtype, direction)
                done += 1
        if dtype == bench.dtypes[0]:
            for name, text, measure in asides:
                tell(text)
                found[name] = measure()
                done += 1
            bench.deadline = deadline
    if progress is not None:
        progress(total, total, "done", 0.0)
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
            targets.LONG: f"n_iters {LONG_ITERS}, eps {LONG_EPS}, constant",
            "k": "9n/64; torch.topk: n/8",
        },
        "results": results,
        **found,
        "targets": targets.evaluate(_measured(device, results, found)),
    }


_DIRECTIONS = ("forward", "backward")


# --- beside the times of kernels -------------------------------------------------------------------------------------


def _asides(
    device: torch.device, only: Sequence[str] | None, shapes: tuple[Shape, ...] | None
) -> list[tuple[str, str, Callable[[], Any]]]:
    """What is measured besides: (name, text for progress, the work). A run that was asked for less has less of it."""

    def wants(listed: tuple[Shape, ...]) -> bool:
        return shapes is None or any(shape in shapes for shape in listed)

    ours = [op for op in ("soft_topk", "coordinate_descent") if only is None or op in only]
    made: list[tuple[str, str, Callable[[], Any]]] = []
    if ours and wants(targets.STANDARD):
        made.append(("memory", "memory kept for the backward", lambda: memory_kept(device, ours)))
    if ours and shapes is None:
        made.append(("host_time", "host time of a call", lambda: host_time(device)))
    if "coordinate_descent" in ours and not _serves(device) and wants(targets.CPU_SHAPE):
        made.append(("cpu", f"on {targets.CPU_THREADS} cores of the CPU", lambda: on_the_cpu(ours)))
    return made


def _serves(device: torch.device) -> bool:
    """Whether a run on a device is itself one on as many cores of a CPU as the targets are for."""
    return device.type == "cpu" and torch.get_num_threads() == targets.CPU_THREADS


def _measured(device: torch.device, results: list[dict[str, Any]], found: dict[str, Any]) -> targets.Measured:
    cpu: Any = found.get("cpu", results if _serves(device) else targets.LEFT_OUT)
    return targets.Measured(
        device.type,
        results,
        cpu=cpu["results"] if isinstance(cpu, dict) else cpu,
        memory=found.get("memory", targets.LEFT_OUT),
        host=found.get("host_time", targets.LEFT_OUT),
    )


def memory_kept(device: torch.device, ops: Sequence[str]) -> list[dict[str, Any]]:
    """What autograd keeps for a backward beyond the scores and the output, by its own word (saved_tensors_hooks).

    Returns:
        Rows {op, dtype, rows, n, floats_a_row, growth, status}: bytes kept a row over those of a float32, and the bytes that a row
        twice as long keeps more, as a share of the bytes that it has more.
    """
    made = []
    for op in ops:
        for dtype in (targets.DTYPE, targets.BESIDE):
            for rows, n in targets.STANDARD:
                row: dict[str, Any] = {"op": op, "dtype": dtype, "rows": rows, "n": n}
                row |= {"floats_a_row": None, "growth": None, "status": "ok"}
                try:
                    kind = getattr(torch, dtype)
                    short, long = (_kept_bytes(op, rows, length, kind, device) for length in (n, 2 * n))
                except Exception as error:
                    row["status"] = f"skipped: {one_line(error)}"
                else:
                    row["floats_a_row"] = short / rows / 4
                    row["growth"] = (long - short) / (rows * n * kind.itemsize)
                made.append(row)
    return made


def _kept_bytes(op: str, rows: int, n: int, dtype: torch.dtype, device: torch.device) -> int:
    from ..router import coordinate_descent, soft_topk

    p = PUBLISHED
    scores = torch.randn(rows, n, device=device).to(dtype).requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if op == "soft_topk":
            output = soft_topk(scores, k_of(n), eps=EXACT_EPS)
        else:
            schedule: dict[str, Any] = {"eps": p.eps, "eps_init": p.eps_init, "eps_decay": p.eps_decay}
            output = coordinate_descent(scores, k_of(n), n_iters=p.n_iters, **schedule)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for one in (scores, output):
        storages.pop(one.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def host_time(device: torch.device) -> dict[str, Any] | str:
    """Microseconds of the host for one eager call, ours and a bare one, or the reason why there are none."""
    try:
        found = hosttime.measure(device)
    except Exception as error:
        return one_line(error)
    return f"it is not measured on this device ({device.type})" if found is None else dict(found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_the_cpu(ops: Sequence[str]) -> dict[str, Any] | str:
    """Ours and the eager published recurrence on the CPU with as many threads as the targets are for; or why not."""
    threads = targets.CPU_THREADS
    if _cores() < threads:
        return f"it is for {threads} cores of a CPU, and this process may use {_cores()}"
    names = [("coordinate_descent", targets.EAGER.implementation), *((op, "coordroute") for op in ops)]
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    found = [one for one in contenders(False, ops, "cpu") if (one.op, one.implementation) in names]
    results: list[dict[str, Any]] = []
    torch.set_num_threads(threads)
    try:
        bench = _Bench(cpu, found, time.monotonic() + ASIDE_SECONDS)
        for dtype in (targets.DTYPE, targets.BESIDE):
            for shape in targets.CPU_SHAPE:
                for direction in _DIRECTIONS:
                    results += bench.measure(*shape, dtype, direction)
    finally:
        torch.set_num_threads(before)
    return {"device": devices.describe(cpu), "threads": threads, "results": results}


# --- the race --------------------------------------------------------------------------------------------------------


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
                        reason = self.too_slow(work)
                    except Exception as error:
                        reason = one_line(error)
                    if reason is None:
                        works.append(work)
                        timed.append(row)
                    if contender.compiles:
                        self.compile_seconds += time.monotonic() - begin
                if reason is not None:
                    row["status"] = f"skipped: {reason}"
                elif on_gpu and row["implementation"] == "coordroute" and targets.counts_sweeps(contender.op, direction, rows, n):
                    row |= self.sweeps(rows, n, dtype)
            samples, target = SAMPLES[self.device.type]
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

    def too_slow(self, work: timing.Work) -> str | None:
        """Why a piece of work is left out whose first call has been made, or None: a second one takes too long."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.monotonic()
        work.call(0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took, limit = time.monotonic() - begin, CALL_SECONDS[self.device.type]
        return f"a call takes {took:.2g} s, the limit is {limit:g} s" if took > limit else None

    def sweeps(self, rows: int, n: int, dtype: str) -> dict[str, Any]:
        """How often the forward of soft_topk goes over the scores that are timed: the mean of the input sets, as the time is."""
        try:
            from ..kernels.soft_topk import count_sweeps

            sets = timing.input_sets(self.device, 2 * rows * n * getattr(torch, dtype).itemsize)
            counts = [int(count_sweeps(scores, k_of(n), EXACT_EPS).max()) for scores in self.scores(rows, n, dtype, sets)]
            # a whole number where it is one
            return {"sweeps": statistics.mean(counts)}
        except Exception as error:
            return {"sweeps": None, "sweeps_reason": one_line(error)}

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
        fixed = GPU_SHAPES if self.device.type == "cuda" else CPU_SHAPES
        if contender.shapes is not None and (rows, n) not in contender.shapes and (contender.compiles or (rows, n) in fixed):
            listed = ", ".join(f"{r}x{c}" for r, c in contender.shapes if (r, c) in fixed)
            return f"measured only at {listed}" + (", since each shape is compiled" if contender.compiles else "")
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
        scores = self.scores(rows, n, dtype, sets)
        if direction == "forward":
            return timing.Work(contender.implementation, _forward(call, scores), sets, size)
        for one in scores:
            one.requires_grad_()
        with torch.enable_grad():
            outputs = [call(one) for one in scores]
        grads = self.scores(rows, n, dtype, sets, seed=1)
        return timing.Work(contender.implementation, _backward(outputs, scores, grads), sets, size)

    def scores(self, rows: int, n: int, dtype: str, sets: int, seed: int = 0) -> list[torch.Tensor]:
        """Normal scores: the same for the same arguments, and for fewer sets the first of them."""
        generator = torch.Generator(self.device).manual_seed(seed)
        kind = getattr(torch, dtype)
        return [torch.randn(rows, n, generator=generator, device=self.device).to(kind) for _ in range(sets)]


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
