"""Timing that compares: everything that is compared is measured in the same rounds, in rotating order.

On a GPU each piece of work becomes one CUDA graph of many calls over rotating sets of input (together larger than the
second-level cache, so that it is cold), and an event before and after the replay: the host is not in the figure. On a
CPU a sample is a loop of calls between two readings of the performance counter. The figure is the median over the
rounds; its 95 % interval comes from order statistics and assumes no distribution.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_SAMPLES = 5

_SPIN_CYCLES = 300_000
"""The GPU waits about 0.2 ms at the head of a round, so that the host has queued what follows before it starts."""


@dataclass
class Work:
    """A piece of work to be timed.

    Attributes:
        name: for the reader.
        call: does the work once on input set ``i``, ``0 <= i < sets``. What it returns is kept alive until the sets are
            used again, so that outputs rotate as inputs do.
        sets: the number of input sets.
        bytes_per_set: what one call reads and writes, to say whether the cache is cold; 0 is unknown.
        capture: whether to try a CUDA graph; without one, events stand around a loop of calls.
    """

    name: str
    call: Callable[[int], Any]
    sets: int = 1
    bytes_per_set: int = 0
    capture: bool = True


@dataclass
class Timed:
    """Microseconds for one call, one value a round.

    Attributes:
        samples: one value for each round, in the order of the rounds.
        method: how it was measured, for the reader.
    """

    samples: list[float]
    method: str

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples)

    @property
    def ci_us(self) -> tuple[float, float]:
        return median_interval(self.samples)

    def to_json(self) -> dict[str, Any]:
        lo, hi = self.ci_us
        return {
            "median_us": round(self.median_us, 4),
            "ci_us": [round(lo, 4), round(hi, 4)],
            "samples": len(self.samples),
            "method": self.method,
        }


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics; the whole range where there are fewer than 6 samples."""
    ordered = sorted(samples)
    count = len(ordered)
    rank = max(math.floor((count - 1.96 * math.sqrt(count)) / 2), 0)
    return ordered[rank], ordered[count - 1 - rank]


def paired_ratio(a: Timed, b: Timed) -> tuple[float, float, float]:
    """Median and 95 % interval of time of ``a`` over time of ``b``, round by round, so that drift cancels."""
    ratios = [x / y for x, y in zip(a.samples, b.samples, strict=False) if y > 0]
    if not ratios:
        return math.nan, math.nan, math.nan
    return statistics.median(ratios), *median_interval(ratios)


def race(
    works: Sequence[Work],
    device: torch.device,
    *,
    samples: int = 15,
    target_us: float = 400.0,
    seconds: float | None = None,
) -> list[Timed | Exception]:
    """Times several pieces of work against each other.

    Args:
        works: what to time. One that raises yields its exception and does not disturb the others.
        device: where they run.
        samples: rounds.
        target_us: how long one sample should last at least, in microseconds; calls are repeated up to it.
        seconds: stop after this long, though not before ``MIN_SAMPLES`` rounds.

    Returns:
        For each piece of work its timing or the exception that it raised.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _race_cuda(works, device, samples, target_us, seconds)
    return _race_cpu(works, samples, target_us, seconds)


def _rotated(count: int, turn: int) -> list[int]:
    return [(turn + i) % count for i in range(count)]


# --- CPU -------------------------------------------------------------------------------------------------------------


def _race_cpu(works: Sequence[Work], samples: int, target_us: float, seconds: float | None) -> list[Timed | Exception]:
    results: list[Timed | Exception] = [Timed([], "") for _ in works]
    calls = [1] * len(works)
    for i, work in enumerate(works):
        try:
            work.call(0)
            begin = time.perf_counter()
            work.call(1 % work.sets)
            once = (time.perf_counter() - begin) * 1e6
        except Exception as error:
            results[i] = error
            continue
        calls[i] = max(1, min(1000, math.ceil(target_us / max(once, 0.1))))
        results[i] = Timed([], f"perf_counter around {calls[i]} call(s), {work.sets} input set(s), interleaved")
    running = [i for i, result in enumerate(results) if isinstance(result, Timed)]
    begin = time.perf_counter()
    for turn in range(samples):
        for position in _rotated(len(running), turn):
            i = running[position]
            _sample_cpu(works[i], calls[i], turn, results, i)
        if seconds is not None and turn + 1 >= MIN_SAMPLES and time.perf_counter() - begin > seconds:
            break
    return results


def _sample_cpu(work: Work, calls: int, turn: int, results: list[Timed | Exception], i: int) -> None:
    result = results[i]
    if not isinstance(result, Timed):
        return
    try:
        begin = time.perf_counter()
        for call in range(calls):
            work.call((turn + call) % work.sets)
        result.samples.append((time.perf_counter() - begin) * 1e6 / calls)
    except Exception as error:
        results[i] = error


# --- GPU -------------------------------------------------------------------------------------------------------------


def l2_bytes(device: torch.device) -> int:
    """The size of the second-level cache; 64 MiB where the driver does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def input_sets(device: torch.device, bytes_per_set: int, most: int = 256) -> int:
    """How many sets of input rotate so that none is left in the cache when its turn comes; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    return max(2, min(most, math.ceil(2.5 * l2_bytes(device) / max(bytes_per_set, 1))))


def _race_cuda(
    works: Sequence[Work], device: torch.device, samples: int, target_us: float, seconds: float | None
) -> list[Timed | Exception]:
    results: list[Timed | Exception] = []
    replays: list[Callable[[], Any]] = []
    calls: list[int] = []
    # a graph cannot be captured on the default stream; another one that is current is kept, for autograd runs a
    # backward on the stream of its forward
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
    stream.wait_stream(current)
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        for work in works:
            replay, count, result = _prepare(work, stream, target_us, pool)
            replays.append(replay)
            calls.append(count)
            results.append(result)
        running = [i for i, result in enumerate(results) if isinstance(result, Timed)]
        events = {i: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for i in running}
        for i in running:
            replays[i]()
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for turn in range(samples):
            torch.cuda._sleep(_SPIN_CYCLES)
            for position in _rotated(len(running), turn):
                i = running[position]
                events[i][0].record(stream)
                replays[i]()
                events[i][1].record(stream)
            torch.cuda.synchronize(device)
            for i in running:
                result = results[i]
                if isinstance(result, Timed):
                    result.samples.append(events[i][0].elapsed_time(events[i][1]) * 1e3 / calls[i])
            if seconds is not None and turn + 1 >= MIN_SAMPLES and time.perf_counter() - started > seconds:
                break
        replays.clear()
    current.wait_stream(stream)
    return results


def _nothing() -> None:
    return None


def _prepare(
    work: Work, stream: torch.cuda.Stream, target_us: float, pool: Any
) -> tuple[Callable[[], Any], int, Timed | Exception]:
    """Warms a piece of work up, decides how many calls a sample has, and captures them into a graph."""
    try:
        for i in range(2):
            work.call(i % work.sets)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        for i in range(3):
            work.call(i % work.sets)
        end.record(stream)
        end.synchronize()
    except Exception as error:
        return _nothing, 1, error
    once = max(begin.elapsed_time(end) * 1e3 / 3, 0.5)
    count = max(math.ceil(target_us / once), work.sets if once < target_us else 1)
    failure = "not captured"
    if work.capture:
        try:
            graph = _captured(work, count, pool)
        except Exception as error:
            failure = f"capture failed: {type(error).__name__}"
            torch.cuda.synchronize()
        else:
            return graph.replay, count, Timed([], f"CUDA graph of {count} calls, {_cache(work, stream)}, interleaved")
    method = f"CUDA events around a loop of {count} calls ({failure}), {_cache(work, stream)}, interleaved"
    return lambda: _repeat(work, count), count, Timed([], method)


def _captured(work: Work, count: int, pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of ``count`` calls on the current stream. Unlike torch.cuda.graph it collects no garbage, which takes longer
    than the capture."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        _repeat(work, count)
    except BaseException:
        with contextlib.suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _cache(work: Work, stream: torch.cuda.Stream) -> str:
    cold = min(work.sets * work.bytes_per_set / l2_bytes(stream.device), 1.0)
    return f"{work.sets} input sets, " + ("L2 cold" if cold == 1.0 else f"L2 warm for {1 - cold:.0%} or more")


def _repeat(work: Work, count: int) -> None:
    alive: list[Any] = [None] * work.sets
    for i in range(count):
        alive[i % work.sets] = work.call(i % work.sets)
