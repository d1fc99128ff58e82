"""What can be tuned: the keys worth an entry, and the valid launch configurations of a key.

Forward and backward of ``coordinate_descent`` share the number of checkpoint segments, so keys are tuned in groups: one
operator, dtype, number of rows and length, both directions.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from ..reports import evidence
from ..reports.evidence import Form
from .strategies import neighbours

SEGMENTS = (20, 10, 5, 4, 2, 1)
"""Checkpoint segments at ``TUNED_N_ITERS`` iterations, the most memory and the least recomputation first."""

EFFORTS = ("quick", "full")


class Group(NamedTuple):
    """What is tuned together: both directions of one operator on one bucket."""

    op: str
    dtype: str
    rows: int
    n: int

    def key(self, direction: str) -> Key:
        return Key(self.op, direction, self.dtype, self.rows, self.n)

    def label(self) -> str:
        return f"{self.op} {self.dtype} {self.rows}x{self.n}"


_GPU_QUICK = (
    (1024, 8192),
    (4096, 2048),
    (65536, 256),
    (16, 4096),
    (4, 131072),
    (1, 1048576),
)
_GPU_FULL = (
    *_GPU_QUICK,
    (1024, 16384),
    (64, 8192),
    (16, 1024),
    (65536, 64),
    (16384, 1024),
    (4096, 256),
    (4096, 512),
    (1024, 1024),
    (1024, 2048),
    (1024, 4096),
    (64, 32768),
    (256, 8192),
    (64, 1024),
    (16, 16384),
    (16, 65536),
    (4, 1024),
    (4, 32768),
    # where a program has a row, and the rows fill the processors a few times: some more of them may want another
    (256, 4096),
    (512, 8192),
    (256, 16384),
    (512, 16384),
    (128, 32768),
    # rows that do not fill their block, where the registers of that binary say how many run at a time
    (4096, 1600),
    (256, 3200),
    (1024, 3200),
    (256, 6400),
    (512, 6400),
    (1024, 6400),
    (256, 12800),
    (512, 12800),
    (1024, 12800),
    (384, 6400),
    (768, 6400),
    (384, 12800),
    (768, 12800),
    (128, 25600),
)
_CPU_QUICK = ((256, 512), (64, 4096), (4, 65536))
_CPU_FULL = (*_CPU_QUICK, (4096, 64), (1024, 512), (1024, 2048), (16, 4096), (256, 8192), (1, 262144))


def groups(backend: str, effort: str, shapes: Sequence[tuple[int, int]] | None = None) -> list[Group]:
    """The groups to tune, the most useful first.

    Args:
        backend: ``"triton"`` or ``"cpu"``.
        effort: ``"quick"`` or ``"full"``.
        shapes: rows and length of calls, whose buckets are tuned; None is the fixed list of the effort.
    """
    fixed: Sequence[tuple[int, int]]
    dtypes: tuple[str, ...]
    if backend == "triton":
        fixed = _GPU_QUICK if effort == "quick" else _GPU_FULL
        dtypes = ("float32", "bfloat16") if effort == "quick" else ("float32", "bfloat16", "float16")
    else:
        fixed = _CPU_QUICK if effort == "quick" else _CPU_FULL
        dtypes = ("float32",) if effort == "quick" else ("float32", "bfloat16")
    found = [
        Group(op, dtype, kernel_config.bucket_rows(rows), kernel_config.bucket_n(n))
        for dtype in dtypes
        for rows, n in (fixed if shapes is None else shapes)
        for op in kernel_config.OPS
    ]
    return list(dict.fromkeys(found))


def segment_choices(op: str, effort: str) -> tuple[int | None, ...]:
    """Numbers of checkpoint segments to try; the default first. (None,) where the operator has none."""
    if op != "coordinate_descent":
        return (None,)
    return (20, 4) if effort == "quick" else SEGMENTS


def candidates(key: Key, backend: str, effort: str) -> list[LaunchConfig]:
    """The configurations to try for a key, the heuristic's own first, without repetition.

    All have the heuristic's number of checkpoint segments; those are chosen on top, see :func:`with_segments`.
    """
    default = kernel_config.heuristic(key, backend)
    key = key._replace(n=kernel_config.next_power_of_2(key.n))
    found = _gpu(key, default, effort) if backend == "triton" else _cpu(key, default, effort)
    return list(dict.fromkeys([default, *found]))


def seeds(key: Key, backend: str) -> list[LaunchConfig]:
    """Where a search begins, the heuristic's own first: on a GPU at what is one step from it, on a CPU at a few far apart."""
    if backend == "cpu":
        return candidates(key, backend, "quick")
    found = candidates(key, backend, "full")
    return [found[0], *neighbours(found[0], found)]


def with_segments(config: LaunchConfig, segments: int | None) -> LaunchConfig:
    return replace(config, checkpoint_segments=segments)


def fitted(config: LaunchConfig, source: Key, key: Key) -> LaunchConfig:
    """A configuration of another key of the same operator and direction, carried over to this key's length.

    A resident row has its own length as its block, and as many warps as keep the scores a thread; programs that share a row
    become more or fewer with its length.
    """
    length, own = (kernel_config.next_power_of_2(one.n) for one in (key, source))
    if config.variant == "resident":
        return replace(config, block=length, num_warps=max(1, min(config.num_warps * length // config.block, 32)))
    if config.variant == "split":
        programs = max(2, config.programs_per_row * length // own)
        return replace(config, programs_per_row=min(programs, 2048))
    return config


BETWEEN = 25
"""Of how many 32nds of the key's rows and of its length the scores are at which what is taken must not lose more than it gains at
its key: near the middle of the bucket of a power of two, whose largest sizes are the key's."""


def between(key: Key, tuned: Container[Key]) -> Key:
    """Fewer and shorter rows than a key's, which its entry serves too; not shorter where others of ``tuned`` serve those."""
    rows, n = (max(1, size * BETWEEN // 32) for size in (key.rows, key.n))
    own = kernel_config.bucket_n(n)
    return key._replace(rows=rows, n=key.n if own != key.n and key._replace(n=own) in tuned else n)


NEW_FORM = 0.97
"""A form that no key of the operator has is taken where it takes less than this share of the time of every form that one has."""

MOST_FORMS, RARE_FORM = 16, 0.9
"""How many forms the keys of an operator are to have, the defaults' among them: when there are so many, a form that no key has is
taken where it takes less than this share."""


def form(config: LaunchConfig) -> Form:
    """A configuration without what follows from the length of the row: what the reports count."""
    return evidence.form(config.to_json())


def least_gain(forms: Collection[Form]) -> float:
    """The share of the time of every form of ``forms`` that a new one may take at most, where an operator has these."""
    return NEW_FORM if len(forms) < MOST_FORMS else RARE_FORM


def familiar(
    ranked: Sequence[LaunchConfig],
    ratios: Mapping[LaunchConfig, float],
    forms: Collection[Form],
    default: LaunchConfig,
    keep: float,
) -> list[LaunchConfig]:
    """The order in which candidates are taken, so that an operator gets along with few forms.

    Args:
        ranked: the candidates by preference (:func:`strategies.preferred`).
        ratios: of each the time over the default's.
        forms: the forms that keys of the operator have.
        default: the heuristic's, with the same checkpoint segments; its form is one of them.
        keep: it is taken before others of a known form that are not faster by so much.

    Returns:
        The same, the first of a known form in front unless a new form is faster by more than :data:`NEW_FORM` says, or, where
        there are :data:`MOST_FORMS`, :data:`RARE_FORM`.
    """
    known = next((config for config in ranked if form(config) in forms), None)
    if known is not None and default in ranked and ratios[default] <= keep * ratios[known]:
        known = default
    if known is None or ratios[ranked[0]] < least_gain(forms) * ratios[known]:
        return list(ranked)
    return [known, *(config for config in ranked if config != known)]


HINTS = 2
FARTHEST = 4.0
"""How many hints a key has at most, and how far the keys are at most that they come from."""


def distance(one: Key, two: Key) -> float:
    """How far apart two keys of an operator are: doublings of the length and of the rows, and one for another dtype."""
    away = abs(math.log2(one.n / two.n)) + abs(math.log2(one.rows / two.rows))
    return away + (one.dtype != two.dtype)


def hints(key: Key, chosen: Mapping[Key, LaunchConfig]) -> list[LaunchConfig]:
    """What the nearest other keys of the same operator and direction use, carried over to this key, the nearest first."""
    near = [one for one in chosen if one[:2] == key[:2] and one != key and distance(one, key) <= FARTHEST]
    near.sort(key=lambda one: (distance(one, key), one))
    return list(dict.fromkeys(fitted(chosen[one], one, key) for one in near))[:HINTS]


# --- GPU -------------------------------------------------------------------------------------------------------------


MAX_PER_THREAD = 128
"""32-bit words of scores that a thread may hold."""


def is_valid(config: LaunchConfig, key: Key) -> bool:
    """Whether a GPU configuration makes sense: the row fits, and a thread has neither too little nor too much."""
    if config.rows_per_program > max(1, key.rows) or not 1 <= config.num_warps <= 32:
        return False
    # a multiprocessor has 65536 registers, a thread at most 255
    if config.max_registers * 32 * config.num_warps > 65536 or config.max_registers > 255:
        return False
    words = 2 if key.dtype == "float64" else 1
    per_thread = config.rows_per_program * config.block * words / (32 * config.num_warps)
    if config.max_registers and config.max_registers < per_thread + 24:
        return False
    if config.variant == "resident":
        if not key.n <= config.block <= kernel_config.MAX_RESIDENT_N // words:
            return False
        return per_thread <= MAX_PER_THREAD and (per_thread >= 2 or config.num_warps == 1)
    if config.variant == "split":
        if config.programs_per_row < 2 or config.programs_per_row * 16 > key.n:
            return False
        side_by_side = key.direction == "forward"
        if side_by_side and config.programs_per_row * key.rows > 2 * kernel_config.PROCESSORS:
            return False
        return 2 <= per_thread <= MAX_PER_THREAD
    return config.rows_per_program == 1 and 2 <= per_thread <= 32


def _gpu(key: Key, default: LaunchConfig, effort: str) -> list[LaunchConfig]:
    made: list[LaunchConfig] = []
    words = 2 if key.dtype == "float64" else 1
    if key.n <= kernel_config.MAX_RESIDENT_N // words:
        made += _resident(key, default, effort)
    if key.n >= 16384 and key.rows <= 64:
        made += _split(key, default, effort)
    if default.variant == "tiled" or (effort == "full" and key.n >= 8192 and key.rows >= 64):
        tiles = [(4096, 16, 1), (8192, 32, 1), (4096, 8, 1), (8192, 16, 2)]
        if effort == "full":
            tiles += ((b, w, s) for b in (2048, 4096, 8192) for w in (8, 16, 32) for s in (1, 2))
        made += [LaunchConfig("tiled", b, 1, w, s, default.checkpoint_segments) for b, w, s in tiles if b < 2 * key.n]
    return [config for config in made if is_valid(config, key)]


_CAPS = (32, 40, 48, 64, 80, 96, 128, 168)
"""Limits of registers a thread that are tried: the fewer, the more programs run side by side, and the more is spilled."""


def _resident(key: Key, default: LaunchConfig, effort: str) -> list[LaunchConfig]:
    """Threads with 4 to 128 scores; the more a thread has, the less is done twice, the fewer programs run side by side."""
    few = key.rows * key.n <= 1 << 20
    if effort == "full":
        shares: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    elif few:
        shares = (4, 8, 16, 32)
    else:
        shares = (16, 32, 64, 128) if key.op == "coordinate_descent" else (8, 16, 32, 64)
    made = []
    for rows in (1, 2, 4, 8, 16, 32) if key.n < 2048 else (1, 2) if effort == "full" else (1,):
        for share in shares:
            warps = rows * key.n // (32 * share)
            # several rows a program pay where few warps take them all
            if warps < 1 or (rows > 1 and warps > (8 if effort == "full" else 1)):
                continue
            plain = LaunchConfig("resident", key.n, rows, warps, 1, default.checkpoint_segments)
            made.append(plain)
            if effort == "full":
                made += [replace(plain, max_registers=cap) for cap in _CAPS if share <= cap - 24 and cap <= 4 * share + 32]
            elif not few:
                made += [
                    replace(plain, max_registers=cap) for cap in {8: (40,), 16: (64,), 32: (80,), 64: (128,), 128: (168,)}[share]
                ]
    if not made:
        made.append(LaunchConfig("resident", key.n, 1, 1, 1, default.checkpoint_segments))
    return made


def _split(key: Key, default: LaunchConfig, effort: str) -> list[LaunchConfig]:
    """Rows shared by as many programs as there are processors for, or half of them; backwards by any number."""
    full, made = effort == "full", []
    if key.direction == "forward":
        most = kernel_config.side_by_side(key.rows)
        counts = [most >> shift for shift in range(4 if full else 2)]
    else:
        counts = [key.n // block for block in ((1024, 2048, 4096, 8192, 16384) if full else (2048, 4096, 8192))]
    for programs in counts:
        if programs < 2 or key.n // programs < 512:
            continue
        chunk = key.n // programs
        blocks = (chunk,) if chunk <= 16384 else (4096, 8192, 16384) if full else (8192, 16384)
        shares = (4, 8, 16, 32, 64) if full else (16, 32, 64) if key.direction == "forward" else (16, 32)
        for block in blocks:
            for share in shares:
                warps = block // (32 * share)
                if 1 <= warps <= 32:
                    made.append(
                        LaunchConfig("split", block, 1, warps, 1, default.checkpoint_segments, programs_per_row=min(programs, 2048))
                    )
    return made


# --- CPU -------------------------------------------------------------------------------------------------------------


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use, or None: then nothing can be compiled here."""
    import os

    named = os.environ.get("CXX", "")
    return next((path for name in (named, "g++", "clang++", "cl") if name and (path := shutil.which(name))), None)


def _cpu(key: Key, default: LaunchConfig, effort: str) -> list[LaunchConfig]:
    import torch

    held = default.rows_per_program
    factors = (0.25, 4, 16) if effort == "quick" else (1 / 16, 0.25, 4, 16, 64)
    blocks = [int(held * factor) for factor in (1, *factors)]
    # a block of more rows than there are is the block of all rows
    blocks = list(dict.fromkeys(min(block, key.rows) for block in blocks if block >= 1))
    made = [replace(default, rows_per_program=block) for block in blocks]
    large = sorted(blocks)[-2:] if effort == "quick" else blocks
    if torch.get_num_threads() > 1:
        made += [replace(default, rows_per_program=block, num_threads=1) for block in large]
    if cpp_compiler():
        made += [replace(default, variant="inductor", rows_per_program=block) for block in large]
    return made
