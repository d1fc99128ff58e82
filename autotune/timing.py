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
from collections.abc import Callable, Hashable, Sequence
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
    results: list[Timed | Exception] = []
    with Race(device, target_us) as running:
        for i, work in enumerate(works):
            try:
                results.append(Timed([], running.add(i, work)))
            except Exception as error:
                results.append(error)
        begin = time.perf_counter()
        for turn in range(samples):
            found = running.round([i for i, result in enumerate(results) if isinstance(result, Timed)])
            for i, result in enumerate(results):
                sample = found.get(i)
                if isinstance(sample, Exception):
                    results[i] = sample
                elif sample is not None and isinstance(result, Timed):
                    result.samples.append(sample)
            if seconds is not None and turn + 1 >= MIN_SAMPLES and time.perf_counter() - begin > seconds:
                break
    return results


class Race:
    """Pieces of work that are prepared once and then timed in rounds, as many and as often as one likes.

    Use as a context manager. A piece of work has an identifier, which is any hashable object.
    """

    def __init__(self, device: torch.device, target_us: float = 400.0) -> None:
        self._track = _Cuda(device, target_us) if device.type == "cuda" else _Cpu(target_us)
        self._turn = 0

    def __enter__(self) -> Race:
        self._track.enter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._track.leave()

    def add(self, name: Hashable, work: Work) -> str:
        """Prepares a piece of work and says how it will be measured; raises what the work raises."""
        return self._track.add(name, work)

    def drop(self, name: Hashable) -> None:
        """Lets go of a piece of work."""
        self._track.drop(name)

    def round(self, names: Sequence[Hashable]) -> dict[Hashable, float | Exception]:
        """One sample of each, in microseconds a call; in the next round another one is the first."""
        turn, self._turn = self._turn, self._turn + 1
        count = len(names)
        return self._track.round([names[(turn + i) % count] for i in range(count)], turn)


# --- CPU -------------------------------------------------------------------------------------------------------------


class _Cpu:
    def __init__(self, target_us: float) -> None:
        self._target_us = target_us
        self._works: dict[Hashable, tuple[Work, int]] = {}

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        self._works.clear()

    def add(self, name: Hashable, work: Work) -> str:
        work.call(0)
        begin = time.perf_counter()
        work.call(1 % work.sets)
        once = (time.perf_counter() - begin) * 1e6
        calls = max(1, min(1000, math.ceil(self._target_us / max(once, 0.1))))
        self._works[name] = work, calls
        return f"perf_counter around {calls} call(s), {work.sets} input set(s), interleaved"

    def drop(self, name: Hashable) -> None:
        del self._works[name]

    def round(self, names: Sequence[Hashable], turn: int) -> dict[Hashable, float | Exception]:
        samples: dict[Hashable, float | Exception] = {}
        for name in names:
            work, calls = self._works[name]
            try:
                begin = time.perf_counter()
                for call in range(calls):
                    work.call((turn + call) % work.sets)
                samples[name] = (time.perf_counter() - begin) * 1e6 / calls
            except Exception as error:
                samples[name] = error
        return samples


# --- GPU -------------------------------------------------------------------------------------------------------------


def l2_bytes(device: torch.device) -> int:
    """The size of the second-level cache; 64 MiB where the driver does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def input_sets(device: torch.device, bytes_per_set: int, most: int = 256) -> int:
    """How many sets of input rotate so that none is left in the cache when its turn comes; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    return max(2, min(most, math.ceil(2.5 * l2_bytes(device) / max(bytes_per_set, 1))))


@dataclass
class _Prepared:
    replay: Callable[[], Any]
    calls: int
    begin: torch.cuda.Event
    end: torch.cuda.Event


class _Cuda:
    def __init__(self, device: torch.device, target_us: float) -> None:
        self._device, self._target_us = device, target_us
        self._stack = contextlib.ExitStack()
        self._prepared: dict[Hashable, _Prepared] = {}

    def enter(self) -> None:
        self._stack.enter_context(torch.cuda.device(self._device))
        # a graph cannot be captured on the default stream; another one that is current is kept, for autograd runs a
        # backward on the stream of its forward
        self._current = torch.cuda.current_stream(self._device)
        default = self._current == torch.cuda.default_stream(self._device)
        self._stream = torch.cuda.Stream(self._device) if default else self._current
        self._stream.wait_stream(self._current)
        self._pool = torch.cuda.graph_pool_handle()
        self._stack.enter_context(torch.cuda.stream(self._stream))

    def leave(self) -> None:
        self._prepared.clear()
        self._stack.close()
        self._current.wait_stream(self._stream)

    def add(self, name: Hashable, work: Work) -> str:
        replay, calls, method = _prepare(work, self._stream, self._target_us, self._pool)
        replay()
        torch.cuda.synchronize(self._device)
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._prepared[name] = _Prepared(replay, calls, *events)
        return method

    def drop(self, name: Hashable) -> None:
        del self._prepared[name]

    def round(self, names: Sequence[Hashable], turn: int) -> dict[Hashable, float | Exception]:
        torch.cuda._sleep(_SPIN_CYCLES)
        for name in names:
            one = self._prepared[name]
            one.begin.record(self._stream)
            one.replay()
            one.end.record(self._stream)
        torch.cuda.synchronize(self._device)
        found: dict[Hashable, float | Exception] = {}
        for name in names:
            one = self._prepared[name]
            found[name] = one.begin.elapsed_time(one.end) * 1e3 / one.calls
        return found


def _prepare(work: Work, stream: torch.cuda.Stream, target_us: float, pool: Any) -> tuple[Callable[[], Any], int, str]:
    """Warms a piece of work up, decides how many calls a sample has, and captures them into a graph."""
    for i in range(2):
        work.call(i % work.sets)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    for i in range(3):
        work.call(i % work.sets)
    end.record(stream)
    end.synchronize()
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
            return graph.replay, count, f"CUDA graph of {count} calls, {_cache(work, stream)}, interleaved"
    method = f"CUDA events around a loop of {count} calls ({failure}), {_cache(work, stream)}, interleaved"
    return lambda: _repeat(work, count), count, method


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
