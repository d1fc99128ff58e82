"""Other launches of the same operators, for the verification suite: all must agree with the truth, and so with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..kernels import config as kernel_config
from ..kernels.config import LaunchConfig
from . import proof, space

LAUNCHES = {"triton": ((4096, 256), (64, 4096), (4, 131072)), "cpu": ((256, 512), (64, 4096))}
"""Rows and lengths whose search spaces hold every variant: several rows a program, one, and rows that programs share."""


def variants(op: str, dtype: str, device: str) -> Iterator[tuple[str, int, Callable[..., Any], int | None]]:
    """Every forward and every backward configuration of a quick search at a few shapes, and other numbers of checkpoint segments.

    Args:
        op: "soft_topk" or "coordinate_descent".
        dtype: of the scores, such as "float32".
        device: where they run.

    Yields:
        A name, the length of rows it is for, the operator launched so, and the rows of a batch at most, as in a proof.
    """
    backend = "triton" if torch.device(device).type == "cuda" else "cpu"
    for rows, n in LAUNCHES[backend]:
        found = []
        for direction in ("forward", "backward"):
            key = kernel_config.make_key(op, direction, getattr(torch, dtype), rows, n)
            made = space.candidates(key, backend, "quick")
            if backend == "triton":
                # rows too long for the registers are read tile by tile; here they are short enough for a test
                tiled = LaunchConfig("tiled", 1024, 1, 8, 1, made[0].checkpoint_segments)
                made += [tiled] if 2 * tiled.block < n <= 4096 else []
            found.append(made)
        forwards, backwards = found
        if op == "coordinate_descent":
            forwards += [replace(forwards[0], checkpoint_segments=count) for count in (1, 3, kernel_config.TUNED_N_ITERS)]
        for i in range(max(len(forwards), len(backwards))):
            forward, backward = forwards[i % len(forwards)], backwards[i % len(backwards)]
            target = proof.operator(op, backend, forward, backward)
            yield f"{_name(forward)} / {_name(backward)}", n, target, proof.most_rows(forward, rows)


def _name(config: LaunchConfig) -> str:
    parts = [f"{config.variant} {config.block}", f"{config.num_warps} warps"]
    for name, value in (("rows", config.rows_per_program), ("programs a row", config.programs_per_row)):
        if value > 1:
            parts.append(f"{value} {name}")
    if config.checkpoint_segments is not None:
        parts.append(f"{config.checkpoint_segments} segments")
    return ", ".join(parts)
