"""Coordinate descent's kernels where they take a short cut: rows that programs share, the tail, the quiet start.

What judges them is what judges all kernels (tests/test_kernels.py), from which the drawing and the bounds are taken.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from coordroute.kernels import coordinate_descent
from coordroute.kernels.config import LaunchConfig
from coordroute.reference import compare

_spec = importlib.util.spec_from_file_location("_shared_test_kernels", Path(__file__).with_name("test_kernels.py"))
assert _spec is not None and _spec.loader is not None
shared = importlib.util.module_from_spec(_spec)
__import__("sys").modules[_spec.name] = shared
_spec.loader.exec_module(shared)
Problem, rows_of, resident, tiled = shared.Problem, shared.rows_of, shared.resident, shared.tiled

OP = "coordinate_descent"


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every allocation is poisoned; numpy is not to tell of inf - inf that a select throws away."""
    made = shared.Guarded(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    made.check()


def split(block: int, programs: int) -> LaunchConfig:
    return LaunchConfig("split", block, 1, 1, 1, programs_per_row=programs)


@pytest.mark.parametrize(
    ("config", "names"), [(split(32, 2), shared.NAMES), (split(16, 2), ("normal", "holes", "NaN", "infinite"))], ids=str
)
def test_shared_rows_of_every_family(config: LaunchConfig, names: tuple[str, ...]) -> None:
    """Chunks that stay in registers, one of them ragged, and chunks that are re-read in tiles."""
    p = Problem(OP, 44, rows_of(*names), eps=0.3, n_iters=3)
    d = shared.draw(p)
    kinks = shared.judge(p, d, shared.run(p, d, config))
    assert kinks.mean() <= compare.KINK_SHARE


@pytest.mark.parametrize("dtype", shared.DTYPES)
def test_shared_rows_of_every_dtype(dtype: str) -> None:
    rows = rows_of("normal", "ragged mask", "infinite")
    p = Problem(OP, 70, rows, dtype=dtype, eps=0.03, eps_init=4.0, eps_decay=0.2, n_iters=4)
    d = shared.draw(p)
    shared.judge(p, d, shared.run(p, d, split(32, 3)))


@pytest.mark.parametrize("name", shared.SCHEDULES)
def test_shared_rows_of_every_schedule(name: str) -> None:
    p = Problem(OP, 40, rows_of("normal", "cauchy"), **shared.SCHEDULES[name])
    d = shared.draw(p)
    shared.judge(p, d, shared.run(p, d, split(32, 2)))


@pytest.mark.parametrize("config", [split(32, 2), split(16, 2)], ids=str)
def test_shared_rows_have_the_same_bits_for_every_number_of_segments(config: LaunchConfig) -> None:
    p = Problem(OP, 48, rows_of("normal", "holes", "NaN"), eps=0.2, eps_init=1.0, eps_decay=0.5, n_iters=4)
    d = shared.draw(p)
    found = set()
    for segments in (1, 4):
        made = shared.run(replace(p, segments=segments), d, config)
        lam, states, ds, dk = made.raw
        found.add((shared.bits(lam), shared.bits(states[:, -1]), shared.bits(ds), shared.bits(dk)))
    assert len(found) == 1


def test_what_one_program_leaves_behind_serves_several() -> None:
    p = Problem(OP, 60, rows_of("normal", "cauchy"), tensor_k=False, eps=0.3, n_iters=3)
    d = shared.draw(p)
    for forward, backward in ((resident(60), split(32, 2)), (split(32, 2), resident(60, 2)), (split(16, 2), tiled(32))):
        shared.judge(p, d, shared.run(p, d, forward, backward))


TAILS = {
    "one cell": {"eps": 1.0, "n_iters": 6},
    "several cells": {"eps": 0.05, "n_iters": 14},
    "wider than one exponential bears": {"eps": 0.005, "n_iters": 14},
    "after a schedule": {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.3, "n_iters": 12},
    "a constant eps above the floor": {"eps": 0.03, "eps_init": 0.2, "n_iters": 8},
}


@pytest.mark.parametrize(
    ("dtype", "config"), [("float32", resident(40, 4)), ("float64", resident(40, 4)), ("float32", split(32, 2))], ids=str
)
@pytest.mark.parametrize("name", TAILS)
def test_tails(name: str, dtype: str, config: LaunchConfig) -> None:
    rows = rows_of(
        "normal", "bimodal gap", "k = 1", "offset", "uniform", "cauchy", "ragged mask", "ties", "k = n - 1", "huge scale"
    )
    p = Problem(OP, 40, rows if config.variant == "resident" else rows[:2], dtype=dtype, **TAILS[name])
    d = shared.draw(p)
    shared.judge(p, d, shared.run(p, d, config))


@pytest.mark.parametrize("name", TAILS)
def test_tails_do_not_depend_on_the_rows_beside_nor_on_segments(name: str) -> None:
    rows = rows_of("normal", "huge scale", "tiny scale", "NaN", "cauchy", "k = 0", "uniform")
    p = Problem(OP, 24, rows, **TAILS[name])
    d = shared.draw(p)
    together = shared.run(p, d, resident(24, 4))
    for config, segments in ((resident(24), p.n_iters), (resident(24, 2), 1), (resident(24, 4), 5)):
        other = shared.run(replace(p, segments=segments), d, config)
        for i in (0, 2, 3):
            assert shared.bits(together.raw[i]) == shared.bits(other.raw[i])


@pytest.mark.parametrize("config", [resident(32, 4), tiled(16), split(16, 2)], ids=str)
def test_quiet_starts(config: LaunchConfig) -> None:
    """Scores so close together that nothing is clamped for a while: states that nothing depends on, and all the rest as ever."""
    p = Problem(
        OP, 32, rows_of("normal", "tiny scale", "uniform", "holes", "k >= n"), eps=0.03, eps_init=4.0, eps_decay=0.7, n_iters=9
    )
    d = shared.draw(p)
    d.k[:] = 3.0
    found = shared.run(p, d, config)
    shared.judge(p, d, found)
    states = found.raw[1].double().cpu().numpy()
    largest = np.where(d.valid, d.s, -np.inf).max(axis=1)
    skipped = (states == -largest[:, None]).sum(axis=1)
    assert (skipped[:4] >= 1).all() and skipped[1] == p.n_iters - 1, skipped
    # and where a row is quiet to the end, lam is k times its softmax
    w = np.exp((d.s[1] - largest[1]) / max(4.0 * 0.7**8, 0.03))
    # lam is taken at eps_T, one step on
    a = max(4.0 * 0.7**8, 0.03) * (np.log(3.0) - np.log(w.sum())) - largest[1]
    np.testing.assert_allclose(found.lam[1], np.exp((d.s[1] + a) / max(4.0 * 0.7**9, 0.03)), rtol=1e-5)


def test_long_schedules_of_shared_rows() -> None:
    """More iterations than a tile of partial sums takes at once."""
    p = Problem(OP, 33, rows_of("normal", "uniform"), dtype="float64", eps=0.05, eps_init=4.0, eps_decay=0.97, n_iters=70)
    d = shared.draw(p)
    shared.judge(p, d, shared.run(p, d, resident(33), split(16, 3)))


def test_nothing_to_share() -> None:
    for rows, n in ((0, 40), (2, 1)):
        s = torch.zeros((rows, n), device=shared.DEVICE)
        how = (3, 0.1, 0.1, 1.0, False)
        for k in (torch.ones(rows, device=shared.DEVICE), 1.0):
            lam, states = coordinate_descent.coordinate_descent_forward(s, k, None, *how, 3, split(16, 2))
            ds, dk = coordinate_descent.coordinate_descent_backward(s, s, states, k, None, *how, split(16, 2))
            assert lam.shape == ds.shape == (rows, n) and torch.isfinite(ds).all()
            assert dk is None if isinstance(k, float) else dk.shape == (rows,)
