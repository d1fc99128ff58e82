"""The launches that ``coordroute sanitize`` looks at: every configuration that serves a device, on rows that try its edges.

A forward and a backward configuration of one key make a pair. A pair is launched as model code launches it, on as few and as
short rows as let its kernels do all that they do: several programs, a last program with rows that are not there, programs that
share a row in the number that they are for a call of the key, several tiles where rows are re-read. The inputs are, in turn,

    whole    tiles without an end inside; no mask, k and eps are numbers
    aligned  rows that end inside a tile where a load of 16 bytes may, a mask, a gap behind each row
    odd      an odd length and an odd gap, a mask, tensors k and eps, fewer saved states than iterations (which are recomputed)
    special  the same binaries, with rows that hold +inf, NaN, -inf alone, equal scores, and budgets that are 0 or too large

All that a kernel may read is initialised and what lies in the gaps is not, so that initcheck sees a read that is too long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from . import device as devices
from . import store
from .proof import PUBLISHED, compute_dtype, raw

INPUTS = ("whole", "aligned", "odd", "special")

BOTH = ("float32", "float64")
DEFAULTS = (((1024, 8192), BOTH), ((4, 131072), BOTH), ((1024, 131072), BOTH), ((1, 1 << 24), ("float32",)))
"""Rows and length at which the heuristic is resident, split, tiled, and split with parts of a row that are re-read; and the types:
the two whose code differs, for the others are computed in float32."""

TILES = 3
"""Tiles of a row that one program re-reads."""

FEW_STATES = 3
"""States that the forward saves where the backward is to recompute the others."""

Configuration = tuple[str, str, str, LaunchConfig]
"""op, direction, dtype and the launch configuration."""


@dataclass(frozen=True)
class Case:
    """One forward and one backward on ``rows`` rows of ``n`` scores; ``inputs`` is one of INPUTS."""

    op: str
    dtype: str
    forward: LaunchConfig
    backward: LaunchConfig
    rows: int
    n: int
    inputs: str

    @property
    def group(self) -> str:
        """The operator and the variants, for a table."""
        variants = dict.fromkeys((self.forward.variant, self.backward.variant))
        return f"{self.op} {'/'.join(variants)}"

    def configurations(self) -> tuple[Configuration, Configuration]:
        return (self.op, "forward", self.dtype, self.forward), (self.op, "backward", self.dtype, self.backward)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        pair = {name: LaunchConfig.from_json(data[name]) for name in kernel_config.DIRECTIONS}
        return cls(**(data | pair))


# --- which launches --------------------------------------------------------------------------------------------------


def configured(device: torch.device) -> list[dict[Key, LaunchConfig]]:
    """What each configuration file that may serve ``device`` chose, in the order of the search.

    An entry whose proof is older than its kernel is among them: it serves again as soon as it is proved.
    """
    found = []
    for verdict in store.files(device):
        if verdict.entries or verdict.rejected:
            found.append(store.stale(verdict.path, devices.backend(device)) | store.read(verdict.path).configs)
    return found


def plan(files: Iterable[dict[Key, LaunchConfig]], processors: int) -> list[Case]:
    """The launches for what the files chose, and for the heuristic where they have nothing of a variant and type.

    Args:
        files: configurations by key, one mapping a file.
        processors: of the GPU; as many programs surely run at the same time, and more never share rows.
    """
    cases: dict[Case, None] = {}
    covered = set()
    for configs in files:
        for key, forward, backward in _pairs(configs):
            covered.add(_paths(key, forward, backward, processors))
            cases |= dict.fromkeys(_cases(key, forward, backward, processors))
    for op in kernel_config.OPS:
        for (rows, n), dtypes in DEFAULTS:
            for dtype in dtypes:
                key = kernel_config.make_key(op, "forward", getattr(torch, dtype), rows, n)
                forward, backward = (_heuristic(key, direction) for direction in kernel_config.DIRECTIONS)
                if _paths(key, forward, backward, processors) not in covered:
                    cases |= dict.fromkeys(_cases(key, forward, backward, processors, ("odd", "special")))
    return list(cases)


def _paths(key: Key, forward: LaunchConfig, backward: LaunchConfig, processors: int) -> tuple[object, ...]:
    """What the code that serves a key goes by: operator, type, variants, and whether parts of a row are re-read."""
    rows = min(key.rows, processors)
    re_read = (
        config.variant == "split" and _whole(config, rows, key.n, processors, config is forward) != key.n
        for config in (forward, backward)
    )
    return key.op, key.dtype, forward.variant, backward.variant, *re_read


def _heuristic(key: Key, direction: str) -> LaunchConfig:
    return kernel_config.heuristic(key._replace(direction=direction), "triton")


def _pairs(configs: dict[Key, LaunchConfig]) -> Iterator[tuple[Key, LaunchConfig, LaunchConfig]]:
    """Forward and backward of each key; the heuristic stands in for one that has no entry, as it does for a call."""
    for key in dict.fromkeys(key._replace(direction="forward") for key in configs):
        keys = (key._replace(direction=direction) for direction in kernel_config.DIRECTIONS)
        forward, backward = (configs.get(one) or _heuristic(key, one.direction) for one in keys)
        yield key, forward, backward


def _cases(
    key: Key, forward: LaunchConfig, backward: LaunchConfig, processors: int, inputs: tuple[str, ...] = INPUTS
) -> Iterator[Case]:
    pair = (forward, backward)
    shared = max((config.rows_per_program for config in pair if config.variant == "resident"), default=1)
    rows = 2 * shared + 1
    if forward.variant == "split":
        rows = min(key.rows, processors)
    longest = min((config.block for config in pair if config.variant == "resident"), default=key.n)
    wholes = {min(_whole(config, rows, key.n, processors, config is forward), longest) for config in pair}
    if any(config.variant == "resident" for config in pair):
        # no call has rows that are much shorter than a resident block; one fills all tiles that are no larger
        wholes = {n for n in wholes if 2 * n > longest}
    case = functools.partial(Case, key.op, key.dtype, forward, backward, rows)
    if "whole" in inputs:
        for n in sorted(wholes):
            yield case(n, "whole")
    n = max(wholes)
    if "aligned" in inputs:
        yield case(max(3 * n // 64 * 16, 1), "aligned")
    for name in ("odd", "special"):
        yield case(max(3 * n // 4 - 1, 1) | 1, name)


def _whole(config: LaunchConfig, rows: int, n: int, processors: int, side_by_side: bool) -> int:
    """A row that fills the tiles of a configuration, and is as long a row as takes the same path as one of ``n``."""
    if config.variant == "resident":
        return config.block
    if config.variant == "tiled":
        return min(n, TILES * config.block)
    programs = config.programs_per_row
    if side_by_side:
        programs = max(1, min(programs, processors // rows))
    span = programs * config.block
    # where a program's part of a row does not fit its block, it is re-read in tiles
    return n if n <= span else 2 * span


# --- their inputs ----------------------------------------------------------------------------------------------------


def _with_gaps(values: torch.Tensor, gap: int, device: torch.device) -> torch.Tensor:
    """``values`` [R, n] on the device, with ``gap`` entries behind each row but the last that nobody has written."""
    rows, n = values.shape
    memory = torch.empty((rows - 1) * (n + gap) + n, dtype=values.dtype, device=device)
    spread = memory.as_strided((rows, n), (n + gap, 1))
    for row, own in zip(spread, values, strict=True):
        row.copy_(own)
    return spread


def _scores(case: Case, generator: torch.Generator) -> torch.Tensor:
    scores = torch.randn(case.rows, case.n, generator=generator)
    if case.inputs == "special":
        for row, values in enumerate(scores):
            if row % 5 == 0:
                values[:: max(case.n // 3, 1)] = float("inf")
            elif row % 5 == 1:
                values[case.n // 2] = float("nan")
            elif row % 5 == 2:
                values[:] = float("-inf")
            elif row % 5 == 3:
                values[:] = 0.5
    return scores.to(getattr(torch, case.dtype))


def run(case: Case, device: torch.device) -> None:
    """Launches the forward and the backward of a case and waits for them."""
    generator = torch.Generator().manual_seed(0)
    scores_here = _scores(case, generator)
    grad_here = torch.randn(case.rows, case.n, generator=generator).to(scores_here.dtype)
    mask_here = torch.rand(case.rows, case.n, generator=generator) < 0.8
    gap = {"whole": 0, "aligned": 16}.get(case.inputs, 2)
    scores, grad = (_with_gaps(values, gap, device) for values in (scores_here, grad_here))
    mask = None if case.inputs == "whole" else _with_gaps(mask_here, gap, device)
    k: float | torch.Tensor = PUBLISHED.k(case.n)
    eps: float | torch.Tensor = PUBLISHED.eps
    forward = case.forward
    if case.inputs in ("odd", "special"):
        budgets = [k] if case.inputs == "odd" else [k, k, 1.0, 0.0, case.n + 1.0]
        compute = compute_dtype(scores.dtype)
        k = torch.tensor([budgets[row % len(budgets)] for row in range(case.rows)], dtype=compute).to(device)
        eps = torch.full((case.rows,), PUBLISHED.eps, dtype=compute).to(device)
        forward = replace(forward, checkpoint_segments=FEW_STATES)
    kernels = raw(case.op, "triton")
    if case.op == "soft_topk":
        _, saved = kernels.forward(scores, k, eps, mask, forward)
        kernels.backward(grad, scores, saved, eps, mask, case.backward)
    else:
        schedule = (PUBLISHED.n_iters, PUBLISHED.eps, PUBLISHED.eps_init, PUBLISHED.eps_decay, isinstance(k, torch.Tensor))
        segments = kernel_config.scale_segments(forward, PUBLISHED.n_iters)
        _, saved = kernels.forward(scores, k, mask, *schedule, segments, forward)
        kernels.backward(grad, scores, saved, k, mask, *schedule, case.backward)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
