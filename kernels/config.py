"""Which launch configuration serves a call.

A configuration is a handful of integers and a variant name. The tuned ones live in the files that the autotuner writes;
this module knows nothing of files. It holds the types, the buckets that make a key out of a call, the safe heuristic
that serves every key for which nothing was tuned, and the lookup that it is handed (:func:`use_lookup`).

A lookup must be a pure memory access: it is on the path of every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

OPS = ("soft_topk", "coordinate_descent")
DIRECTIONS = ("forward", "backward")
DTYPES = ("float16", "bfloat16", "float32", "float64")

TUNED_N_ITERS = 20
"""coordinate_descent is tuned at the published number of iterations; segment counts are scaled from there."""

MAX_RESIDENT_N = 32768
"""The longest row that one program keeps in registers (32 warps, 32 scores a thread)."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        variant: Triton: ``"resident"`` (rows stay in registers), ``"split"`` (several programs share a row and exchange
            their sums) or ``"tiled"`` (rows are re-read tile by tile). CPU: ``"eager"`` or ``"inductor"``.
        block: Columns a tile, a power of two. For ``"resident"`` at least n. Unused on the CPU (0).
        rows_per_program: Rows a program (Triton) or rows a cache-sized block (CPU).
        num_warps: Warps a program; 0 on the CPU.
        num_stages: Software-pipelining depth of loads in loops; 0 on the CPU.
        checkpoint_segments: Segments whose start is saved for the backward of ``coordinate_descent`` at
            ``TUNED_N_ITERS`` iterations; None for ``soft_topk``.
        num_threads: CPU only: threads to use, 0 means torch's own setting.
        programs_per_row: ``"split"`` only: programs that share a row. What one of them has of a row stays in its registers
            where it fits its block, and is re-read tile by tile where it does not.
        max_registers: The most registers a thread may have, so that more programs run side by side; 0 leaves it to the compiler.
    """

    variant: str
    block: int = 0
    rows_per_program: int = 1
    num_warps: int = 0
    num_stages: int = 0
    checkpoint_segments: int | None = None
    num_threads: int = 0
    programs_per_row: int = 1
    max_registers: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LaunchConfig:
        """Builds a configuration from parsed JSON; raises TypeError or ValueError when it is not one."""
        config = cls(**data)
        if not isinstance(config.variant, str):
            raise ValueError(f"variant is {config.variant!r}; a string is needed")
        for name in ("block", "rows_per_program", "num_warps", "num_stages", "num_threads", "programs_per_row", "max_registers"):
            value = getattr(config, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; a whole number of at least 0 is needed")
        segments = config.checkpoint_segments
        if segments is not None and (not isinstance(segments, int) or segments < 1):
            raise ValueError(f"checkpoint_segments is {segments!r}; a whole number of at least 1, or null, is needed")
        return config


class Key(NamedTuple):
    """What a configuration is for. ``rows`` and ``n`` name a bucket; they are not the call's own sizes."""

    op: str
    direction: str
    dtype: str
    rows: int
    n: int


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least ``x`` (1 for 0)."""
    return 1 << max(x - 1, 0).bit_length()


def bucket_rows(rows: int) -> int:
    """Rows are bucketed to the next power of two: 1, 2, 4, …, 262144 and above; 257 to 384 and 513 to 768 on their own.

    A configuration has two, three or four programs of a long row on a processor at a time. How often these fill the chip decides
    which is best, and with so many rows that changes within a power of two.
    """
    bound = min(next_power_of_2(rows), 1 << 18)
    middle = bound * 3 // 4
    return middle if bound in (512, 1024) and rows <= middle else bound


def bucket_n(n: int) -> int:
    """Lengths are bucketed to the next power of two, at least 16 and at most 2**24.

    Rows of 1025 to 32767 that do not fill such a block have buckets of their own, 25/32 of it, which is a length that has many
    of them in its middle: their binaries are other ones, with other registers, and what is best for full rows may not be for them.
    """
    bound = min(max(next_power_of_2(n), 16), 1 << 24)
    return bound * 25 // 32 if n < bound and 2048 <= bound <= MAX_RESIDENT_N else bound


_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


@functools.lru_cache(maxsize=4096)
def make_key(op: str, direction: str, dtype: torch.dtype, rows: int, n: int) -> Key:
    """The key of a call on ``rows`` rows of ``n`` scores of ``dtype``."""
    return Key(op, direction, _DTYPE_NAMES[dtype], bucket_rows(rows), bucket_n(n))


Lookup = Callable[[torch.device, Key], "LaunchConfig | None"]


def _nothing_tuned(device: torch.device, key: Key) -> LaunchConfig | None:
    return None


_lookup: Lookup = _nothing_tuned


def use_lookup(lookup: Lookup) -> None:
    """Hands over the lookup that :func:`resolve` asks first."""
    global _lookup
    _lookup = lookup


@functools.lru_cache(maxsize=4096)
def heuristic(key: Key, backend: str) -> LaunchConfig:
    """A configuration that is right for every key, whether or not it is the fastest.

    Args:
        key: the bucketed key.
        backend: ``"triton"`` or ``"cpu"``.
    """
    key = key._replace(n=next_power_of_2(key.n))  # in rows that do not fill a block it sees no difference
    segments = TUNED_N_ITERS if key.op == "coordinate_descent" else None
    itemsize = 8 if key.dtype == "float64" else 4
    if backend == "cpu":
        # a block of rows that stays in half a MiB of the second-level cache
        rows = max(1, min(256, (1 << 19) // (key.n * itemsize)))
        return LaunchConfig("eager", rows_per_program=rows, checkpoint_segments=segments)
    # near the best of what was timed on an H100 (`coordroute exhaust`, `coordroute autotune --effort full`), at the keys and
    # between them, in few forms; nothing spills in float32 (kernels/aot.py), but for what a limit of registers puts away
    words = itemsize // 4
    if _shared(key, words):
        return _long_rows(key, segments)
    if key.op == "soft_topk":
        tile = _one_pass(key, words) if key.direction == "backward" else _sweeps(key, words)
    else:
        tile = _no_reduction(key, words) if key.direction == "backward" else _iterations(key, words)
    warps = min(max(next_power_of_2(tile.rows * key.n // (32 * tile.scores)), 1), 32)
    limit = tile.max_registers if words == 1 else 0
    return LaunchConfig("resident", key.n, tile.rows, warps, 1, segments, max_registers=limit)


class _Tile(NamedTuple):
    """What a program has of the scores where rows stay in registers.

    Attributes:
        rows: rows a program.
        scores: scores a thread: the more, the less is done twice; the fewer, the more threads share the latency.
        max_registers: the most registers a thread; 0 leaves it to the compiler. A thread that iterates on many scores takes so
            many that few programs run side by side.
    """

    rows: int
    scores: int
    max_registers: int = 0


def _many(key: Key) -> bool:
    """Whether there are more rows than fill the processors."""
    return key.rows * key.n > 1 << 19


def _together(key: Key, scores: int, share: int) -> int:
    """Rows a program of one warp: as many short ones as it holds, as long as there are ``share`` programs of them."""
    return max(1, min(32 * scores // key.n, next_power_of_2(key.rows) // share))


def _sweeps(key: Key, words: int) -> _Tile:
    """soft_topk forward: a few sweeps over the row, each with one reduction."""
    spread = max(key.n // 4, 1)  # a row is spread over a few threads at least
    if words == 2:
        return _Tile(_together(key, 16, 2048), 16)
    if key.dtype == "float32" and key.n in (2048, 8192) and key.rows > 2 * PROCESSORS:
        # half as many scores a thread are as good at these lengths, and much better at those below
        return _Tile(1, 32, 64 if key.n == 8192 else 0)
    long = key.n >= (2048 if _many(key) else 8192) or (key.n >= 1024 and key.rows * key.n >= 1 << 23)
    scores = min(64 if long else 32, spread)
    rows = _together(key, scores, 2048)
    if rows > 1:
        return _Tile(rows, scores, {16: 64, 32: 80, 64: 128}.get(rows * key.n // 32, 0))
    # where one register more would halve the programs, which it does at lengths that are no power of two
    return _Tile(1, scores, 128 if scores == 64 and key.n == 16384 and key.rows > PROCESSORS else 0)


def _one_pass(key: Key, words: int) -> _Tile:
    """soft_topk backward: one pass over the row. Programs of one warp would be too many."""
    if key.n <= 256:
        return _Tile(max(1, min(8, next_power_of_2(key.rows) // 512)), 8)
    return _Tile(1, 8, 40) if key.n <= 2048 or words == 2 else _Tile(1, 16, 64)


def _iterations(key: Key, words: int) -> _Tile:
    """coordinate_descent forward: many sweeps over the row, each with an exponential a score."""
    spread = max(key.n // 2, 1)
    if words == 2:
        return _Tile(_together(key, 16, 1024), 16)
    if key.n <= 1024 and not _many(key):
        return _Tile(1, min(8, spread), 64)
    cells = key.rows * key.n
    if key.n < 2048:
        scores = min(64 if key.n >= 256 and cells >= 1 << 21 else 32, spread)
        return _Tile(_together(key, scores, 1024), scores, 0 if key.n == 1024 and scores == 64 else 128)
    if key.n <= 8192 and not _many(key):
        return _Tile(1, 32, 128)
    if key.n >= 16384 and cells >= 1 << 21:
        return _Tile(1, 128, 168 if key.n == 16384 else 0)
    return _Tile(1, 64, 128 if key.n == 2048 else 168 if key.n == 8192 and key.rows <= 2 * PROCESSORS else 0)


def _no_reduction(key: Key, words: int) -> _Tile:
    """coordinate_descent backward: an exponential a score and iteration, and no reduction among them."""
    half, cells = key.dtype != "float32", key.rows * key.n
    if words == 2:
        return _Tile(_together(key, 16, 1024), 16)
    if key.n > 1024:
        return _Tile(1, 64, 168) if half and key.n >= 8192 and _many(key) else _Tile(1, 32, 128)
    if cells < 1 << 22:
        # a warp for each row, or several where there are few rows
        scores = min(32, max(key.n // 32, 8)) if _many(key) else 8
        return _Tile(1, min(scores, max(key.n // 2, 1)), 128 if scores == 32 else 64)
    scores = min(32, max(key.n // (2 if half else 4), 1))
    return _Tile(_together(key, scores, 1024), scores, 128 if scores == 32 else 0)


def _shared(key: Key, words: int) -> bool:
    """Whether several programs share a row: it is too long for one, or there are few rows and many processors."""
    longest = MAX_RESIDENT_N // words
    if key.direction == "forward":
        return key.n > longest or (key.n == longest and key.rows <= 16)
    return key.n >= longest or (key.n >= 16384 and key.rows * key.n <= 1 << 18)


PROCESSORS = 132
"""Multiprocessors of the GPU that the heuristic has in mind; a launch goes by the GPU's own number (launch.py)."""


def side_by_side(rows: int) -> int:
    """How many programs may share each of so many rows and all run at the same time: a power of two, or 0."""
    return 1 << (PROCESSORS // rows).bit_length() >> 1


def _long_rows(key: Key, segments: int | None) -> LaunchConfig:
    """Rows that are too long for one program, or few enough to be shared by several."""
    cells = key.rows * key.n
    programs = side_by_side(key.rows)
    if key.direction == "backward":
        if key.op == "coordinate_descent":
            # of very many programs a row the exchange takes long
            block = 1024 if key.n <= 1 << 18 else 4096
            warps = 4 if cells <= 1 << 18 else block // 1024
        elif programs < 2 and key.n <= MAX_RESIDENT_N:
            # a row for each processor: none waits for another
            return LaunchConfig("tiled", 4096, 1, 16, 1, segments)
        elif cells <= (1 << 19 if key.dtype == "float32" else 1 << 18):
            block, warps = 1024, 8
        else:
            # one program for each processor, or else enough of them for several
            block, warps = (4096, 16) if cells <= 1 << 19 else (2048, 8)
        if key.dtype == "float64":
            warps = block // 512
        return LaunchConfig("split", block, 1, warps, 1, segments, programs_per_row=min(max(key.n // block, 1), 2048))
    if programs < 2:
        return LaunchConfig("tiled", 4096, 1, 16, 1, segments)
    # more than that wait for each other longer than they gain
    programs = min(programs, max(32, key.n // 8192))
    block = min(max(key.n // programs, 1024), 8192)
    if programs * block < key.n:
        # tiles that are read again: more threads, and a program on every processor
        return LaunchConfig("split", block, 1, 16, 1, segments, programs_per_row=PROCESSORS // key.rows)
    warps = block // 2048 if block >= 4096 else block // 1024
    if key.dtype == "float64":
        warps = max(4, warps)
    return LaunchConfig("split", block, 1, warps, 1, segments, programs_per_row=min(programs, key.n // block))


def fits(config: LaunchConfig, key: Key, n: int) -> bool:
    """Whether a Triton configuration may serve rows of length ``n`` (a resident row must fit its block)."""
    return config.variant != "resident" or config.block >= n


def resolve(op: str, direction: str, dtype: torch.dtype, rows: int, n: int, device: torch.device) -> LaunchConfig:
    """The configuration for a call: the tuned one where there is one that fits, else the heuristic."""
    key = make_key(op, direction, dtype, rows, n)
    config = _lookup(device, key)
    backend = "triton" if device.type == "cuda" else "cpu"
    if config is None or (backend == "triton" and not fits(config, key, n)):
        return heuristic(key, backend)
    return config


def scale_segments(config: LaunchConfig, n_iters: int) -> int:
    """The number of checkpoint segments for ``n_iters`` iterations: the tuned share of them, from 1 to ``n_iters``."""
    tuned = config.checkpoint_segments or TUNED_N_ITERS
    return max(1, min(n_iters, round(tuned * n_iters / TUNED_N_ITERS)))
