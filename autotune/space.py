"""What can be tuned: the keys worth an entry, and the valid launch configurations of a key.

Forward and backward of ``coordinate_descent`` share the number of checkpoint segments, so keys are tuned in groups: one
operator, dtype, number of rows and length, both directions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig

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
    (64, 8192),
    (16, 1024),
    (64, 32768),
    (4, 131072),
    (1, 1048576),
)
_GPU_FULL = (
    *_GPU_QUICK,
    (65536, 64),
    (16384, 1024),
    (4096, 256),
    (4096, 512),
    (1024, 1024),
    (1024, 2048),
    (1024, 4096),
    (1024, 16384),
    (256, 8192),
    (64, 1024),
    (16, 4096),
    (16, 16384),
    (16, 65536),
    (4, 1024),
    (4, 32768),
)
_CPU_QUICK = ((256, 512), (64, 4096), (4, 65536))
_CPU_FULL = (*_CPU_QUICK, (4096, 64), (1024, 512), (1024, 2048), (16, 4096), (256, 8192), (1, 262144))


def groups(backend: str, effort: str) -> list[Group]:
    """The groups to tune, the most useful first.

    Args:
        backend: ``"triton"`` or ``"cpu"``.
        effort: ``"quick"`` or ``"full"``.
    """
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    if backend == "triton":
        shapes = _GPU_QUICK if effort == "quick" else _GPU_FULL
        dtypes = ("float32", "bfloat16") if effort == "quick" else ("float32", "bfloat16", "float16")
    else:
        shapes = _CPU_QUICK if effort == "quick" else _CPU_FULL
        dtypes = ("float32",) if effort == "quick" else ("float32", "bfloat16")
    return [
        Group(op, dtype, kernel_config.bucket_rows(rows), kernel_config.bucket_n(n))
        for dtype in dtypes
        for rows, n in shapes
        for op in kernel_config.OPS
    ]


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
    found = _gpu(key, default, effort) if backend == "triton" else _cpu(key, default, effort)
    return list(dict.fromkeys([default, *found]))


def with_segments(config: LaunchConfig, segments: int | None) -> LaunchConfig:
    return replace(config, checkpoint_segments=segments)


# --- GPU -------------------------------------------------------------------------------------------------------------


def is_valid(config: LaunchConfig, key: Key) -> bool:
    """Whether a GPU configuration makes sense: the row fits, and a thread has neither too little nor too much."""
    if config.rows_per_program > max(1, key.rows) or not 1 <= config.num_warps <= 32:
        return False
    words = 2 if key.dtype == "float64" else 1
    held = config.rows_per_program * config.block
    per_thread = held * words / (32 * config.num_warps)
    if config.variant == "resident":
        if not key.n <= config.block <= kernel_config.MAX_RESIDENT_N // words:
            return False
        return per_thread <= 64 and (per_thread >= 2 or config.num_warps == 1)
    return config.rows_per_program == 1 and 2 <= per_thread <= 32


def _gpu(key: Key, default: LaunchConfig, effort: str) -> list[LaunchConfig]:
    full = effort == "full"
    made: list[LaunchConfig] = []
    if default.variant == "resident":
        held, warps = default.rows_per_program, default.num_warps
        if full:
            pairs: Iterable[tuple[int, int]] = ((r, w) for r in (1, 2, 4, 8, 16, 32) for w in (1, 2, 4, 8, 16, 32))
        else:
            pairs = (
                (held, warps * 2),
                (held, warps // 2),
                (held, warps // 4),
                (held * 2, warps),
                (held * 2, warps * 2),
                (held * 4, warps * 2),
                (held // 2, warps),
            )
        made += [replace(default, rows_per_program=r, num_warps=w) for r, w in pairs if r >= 1 and w >= 1]
    elif key.n <= kernel_config.MAX_RESIDENT_N:
        # too long for the heuristic, which must not spill anywhere; here the compiler is asked
        made += [LaunchConfig("resident", key.n, 1, w, 1, default.checkpoint_segments) for w in (16, 32)]
    if default.variant == "tiled" or (full and key.n >= 4096) or key.n >= 32768:
        tiled = LaunchConfig("tiled", 4096, 1, 16, 1, default.checkpoint_segments)
        if full:
            tiles: Iterable[tuple[int, int, int]] = (
                (b, w, s) for b in (1024, 2048, 4096, 8192, 16384) for w in (4, 8, 16, 32) for s in (1, 2, 3)
            )
        else:
            tiles = ((8192, 16, 1), (8192, 32, 1), (16384, 32, 1), (4096, 16, 2), (4096, 8, 1), (4096, 32, 1))
        if default.variant == "resident":
            tiles = ((8192, 32, 1), (8192, 16, 1))
            if full:
                tiles = ((b, w, s) for b in (4096, 8192) for w in (8, 16, 32) for s in (1, 2))
        made += [replace(tiled, block=b, num_warps=w, num_stages=s) for b, w, s in tiles if b < 2 * key.n]
    return [config for config in made if is_valid(config, key)]


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
