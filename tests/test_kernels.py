"""The raw launches of the Triton kernels against the float64 oracles.

On a machine with a GPU the compiled kernels run, elsewhere the same tests run through Triton's interpreter (see conftest.py).
Every tensor that a launch allocates is filled with NaN, and so is a guard band before and behind it: what is not written, or
written where it should not be, shows.

A row may be off by what ``reference/compare.py`` allows: twice the error of plain torch, and the rounding that nothing avoids.
A row with a kink within rounding has no unique gradient; it is left out and counted, as the verification suite does.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux only")

import triton
import triton.language as tl
from coordroute.kernels import coordinate_descent, launch, soft_topk
from coordroute.kernels.config import LaunchConfig, next_power_of_2
from coordroute.kernels.rows import columns, row_sum
from coordroute.reference import compare, families, oracles
from coordroute.reference.oracles import Array, Truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("soft_topk", "coordinate_descent")
DTYPES = ("float16", "bfloat16", "float32", "float64")
NAMES = tuple(families.FAMILIES)
SLACK_SHARE = 0.1
"""A row is left out of a gradient comparison where its kinks alone may move the gradient by more than this share."""

INTERPRETED = DEVICE == "cpu"

GUARD = 64
"""Elements of the bands around an output."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """numpy, which is what the interpreter computes with, tells of every inf - inf that a select throws away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# --- poisoned outputs ------------------------------------------------------------------------------------------------


class Guarded:
    """Tensors that return from ``new_empty`` are NaN between two bands of NaN: what the launches allocate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []

        plain = torch.Tensor.new_empty

        def new_empty(like: torch.Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
            # Triton's interpreter allocates for itself, on a device that it names
            if options:
                return plain(like, *shape, dtype=dtype, **options)
            return self.empty(shape if isinstance(shape[0], int) else shape[0], dtype or like.dtype, like.device)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = int(np.prod(shape))
        memory = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        view = memory[GUARD : GUARD + count].view(shape)
        self.made.append((memory, view))
        return view

    def check(self) -> None:
        for memory, _ in self.made:
            assert torch.isnan(memory[:GUARD]).all() and torch.isnan(memory[-GUARD:]).all(), "a launch wrote beside its output"


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Every allocation of the kernel modules is poisoned, in every test of this file."""
    made = Guarded(monkeypatch)
    yield made
    made.check()


# --- one launch and its judgement ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A batch of rows and how it is launched. Not all of it has a meaning for both operators."""

    op: str
    n: int
    rows: tuple[tuple[str, int], ...]
    dtype: str = "float32"
    eps: float = 0.1
    tensor_k: bool = True
    tensor_eps: bool = False
    masked: bool = True
    layout: str = "contiguous"
    n_iters: int = 6
    eps_init: float | None = None
    eps_decay: float = 1.0
    segments: int | None = None

    @property
    def schedule(self) -> dict[str, Any]:
        return {"n_iters": self.n_iters, "eps_init": self.eps_init, "eps_decay": self.eps_decay}


@dataclass
class Drawn:
    """The float64 arrays of a problem, each exactly what the dtypes of the launch can hold."""

    s: Array
    valid: families.BoolArray
    k: Array
    eps: Array
    g: Array


def rounded(values: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def draw(p: Problem) -> Drawn:
    dtype = getattr(torch, p.dtype)
    compute = compare.compute_dtype(dtype)
    made = [families.FAMILIES[name].draw(np.random.default_rng([seed, p.n, NAMES.index(name)]), p.n) for name, seed in p.rows]
    s = rounded(np.stack([row.scores for row in made]), dtype)
    valid = np.stack([row.valid for row in made])
    if not p.masked:
        s, valid = np.where(valid, s, -np.inf), np.ones_like(valid)
    k = np.array([row.k for row in made])
    if not p.tensor_k:
        k = np.full_like(k, k[0])
    rng = np.random.default_rng([seed for _, seed in p.rows])
    eps = p.eps * rng.uniform(0.5, 2.0, len(k)) if p.tensor_eps else np.full(len(k), p.eps)
    # what does not count has a gradient too, which must have no part in anything
    g = np.where(valid & (s > -np.inf), rng.standard_normal(s.shape), rng.choice([100.0, np.nan, np.inf], s.shape))
    return Drawn(s, valid, rounded(k, compute), rounded(eps, compute) if p.tensor_eps else eps, rounded(g, dtype))


def strided(values: Array, dtype: torch.dtype) -> torch.Tensor:
    """The values [R] as every second element of a tensor."""
    out = torch.full((len(values), 2), torch.nan, dtype=dtype, device=DEVICE)
    out[:, 0] = torch.from_numpy(values).to(dtype)
    return out[:, 0]


def tensors(p: Problem, d: Drawn) -> dict[str, Any]:
    dtype = getattr(torch, p.dtype)
    compute = compare.compute_dtype(dtype)

    def matrix(values: Any, kind: torch.dtype) -> torch.Tensor:
        return families.laid_out(torch.from_numpy(values).to(kind).to(DEVICE), p.layout)

    return {
        "scores": matrix(d.s, dtype),
        "mask": matrix(d.valid, torch.bool) if not d.valid.all() else None,
        "k": strided(d.k, compute) if p.tensor_k else float(d.k[0]),
        "eps": strided(d.eps, compute) if p.tensor_eps else p.eps,
        "grad": matrix(d.g, dtype),
    }


@dataclass
class Found:
    """What the launches returned; ``raw`` is the tensors themselves."""

    lam: Array
    grad_scores: Array
    grad_k: Array | None
    grad_eps: Array | None
    raw: tuple[torch.Tensor, ...] = field(repr=False, default=())


def run(p: Problem, d: Drawn, config: LaunchConfig, backward: LaunchConfig | None = None) -> Found:
    """Both launches of an operator on the problem."""
    t = tensors(p, d)
    before = {name: value.clone() for name, value in t.items() if isinstance(value, torch.Tensor)}
    backward = backward or config
    if p.op == "soft_topk":
        lam, state = soft_topk.soft_topk_forward(t["scores"], t["k"], t["eps"], t["mask"], config)
        ds, dk, de = soft_topk.soft_topk_backward(t["grad"], t["scores"], state, t["eps"], t["mask"], backward)
    else:
        segments = p.n_iters if p.segments is None else p.segments
        how = (p.n_iters, p.eps, max(p.eps_init or p.eps, p.eps), p.eps_decay, p.tensor_k)
        lam, state = coordinate_descent.coordinate_descent_forward(t["scores"], t["k"], t["mask"], *how, segments, config)
        ds, dk = coordinate_descent.coordinate_descent_backward(t["grad"], t["scores"], state, t["k"], t["mask"], *how, backward)
        de = None
    for name, value in before.items():
        assert torch.equal(t[name].nan_to_num(), value.nan_to_num()), f"{name} was written to"
    assert lam.dtype == ds.dtype == t["scores"].dtype and lam.shape == ds.shape == t["scores"].shape
    assert lam.is_contiguous()
    if p.op == "coordinate_descent" and not p.tensor_k:
        assert dk is None, "a number has no gradient"
    else:
        assert dk.dtype == compare.compute_dtype(lam.dtype)
    raw = tuple(x for x in (lam, state, ds, dk, de) if x is not None)
    as_numpy = [None if x is None or x.numel() == 0 else x.double().cpu().numpy() for x in (lam, ds, dk, de)]
    return Found(*as_numpy, raw)  # type: ignore[arg-type]


def truth_of(p: Problem, d: Drawn) -> Truth:
    unit = compare.roundoff(compare.compute_dtype(getattr(torch, p.dtype)))
    if p.op == "soft_topk":
        return oracles.soft_topk_truth(d.s, d.k, d.eps, d.valid, d.g, unit)
    count = (d.valid & (d.s > -np.inf)).sum(axis=1)
    k = np.minimum(d.k, count) if p.tensor_k else d.k
    truth = oracles.coordinate_descent_truth(d.s, k, eps=p.eps, mask=d.valid, g=d.g, unit=unit, **p.schedule)
    assert truth.grad_k is not None
    if p.tensor_k:  # clamped: nothing to differentiate beyond
        truth.grad_k[:] = np.where(d.k > count, 0.0 * truth.grad_k, truth.grad_k)
    return truth


def plain_errors(p: Problem, d: Drawn, truth: Truth) -> list[Array]:
    """Errors of plain torch in the working precision: lam, gradients of scores, k, eps, each [R]."""
    compute = compare.compute_dtype(getattr(torch, p.dtype))
    count = (d.valid & (d.s > -np.inf)).sum(axis=1)
    k = np.minimum(d.k, count) if p.tensor_k else d.k
    s, k, eps = (torch.from_numpy(x).to(compute).requires_grad_() for x in (d.s, k, d.eps))
    mask = torch.from_numpy(d.valid & (d.s > -np.inf))
    if p.op == "soft_topk":
        lam = oracles.soft_topk_torch(s, k, eps=eps, mask=mask)
    else:
        lam = oracles.coordinate_descent_torch(s, k, eps=p.eps, mask=mask, **p.schedule)
    g = torch.from_numpy(np.where(mask.numpy(), d.g, 0.0)).to(compute)
    gradients = torch.autograd.grad(lam, (s, k, eps), g, allow_unused=True)
    wanted = (truth.lam, truth.grad_scores, truth.grad_k, truth.grad_eps)
    none = np.zeros(len(d.k))
    return [
        none if x is None or w is None else compare.row_errors(x.detach().double().numpy(), w)
        for x, w in zip((lam, *gradients), wanted, strict=True)
    ]


def storage_floor(wanted: Array, dtype: torch.dtype) -> Array:
    """What storing in ``dtype`` costs, [R]; twice that where Triton's interpreter truncates to bfloat16 and hardware rounds."""
    cut = INTERPRETED and dtype == torch.bfloat16
    return compare.storage_floor(wanted, dtype) * (2.0 if cut else 1.0) + (1e-37 if cut else 0.0)


def judge(p: Problem, d: Drawn, found: Found) -> Array:
    """Asserts that every row is within its bound; returns which rows had a kink, [R]."""
    dtype = getattr(torch, p.dtype)
    compute = compare.compute_dtype(dtype)
    truth = truth_of(p, d)
    plain = plain_errors(p, d, truth)
    none = np.zeros(len(d.k))
    table = [
        ("lam", found.lam, truth.lam, plain[0], truth.error_lam, none, dtype),
        ("grad scores", found.grad_scores, truth.grad_scores, plain[1], truth.error_scores, truth.slack_scores, dtype),
    ]
    if found.grad_k is not None:
        table.append(("grad k", found.grad_k, truth.grad_k, plain[2], truth.error_k, truth.slack_k, compute))
    if found.grad_eps is not None:
        table.append(("grad eps", found.grad_eps, truth.grad_eps, plain[3], truth.error_eps, truth.slack_eps, compute))
    kinks = np.zeros(len(d.k), bool)
    for name, mine, wanted, yardstick, floor, slack, stored in table:
        assert wanted is not None
        size = np.abs(wanted) if wanted.ndim == 1 else np.sqrt(np.sum(wanted * wanted, axis=1))
        left_out = (slack > SLACK_SHARE * np.nan_to_num(size)) & (slack > 0)
        limit = compare.bound(yardstick, floor, storage_floor(wanted, stored), dtype) + np.where(left_out, 0.0, slack)
        error = compare.row_errors(mine, wanted)
        bad = ~(error <= limit) & ~left_out
        i = int(np.argmax(bad))
        assert not bad.any(), f"{name}, row {i} {p.rows[i]}: error {error[i]:.3g} > bound {limit[i]:.3g}\n{p}"
        kinks |= left_out
    return kinks


def check(p: Problem, config: LaunchConfig) -> None:
    d = draw(p)
    judge(p, d, run(p, d, config))


def power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def resident(n: int, rows: int = 1, block: int = 0) -> LaunchConfig:
    return LaunchConfig("resident", max(block, power(n)), rows, 1, 1)


def tiled(block: int) -> LaunchConfig:
    return LaunchConfig("tiled", block, 1, 1, 1)


def split(block: int, programs: int) -> LaunchConfig:
    return LaunchConfig("split", block, 1, 1, 1, programs_per_row=programs)


def rows_of(*names: str, seed: int = 0) -> tuple[tuple[str, int], ...]:
    return tuple((name, seed + i) for i, name in enumerate(names))


MIXED = rows_of("normal", "holes", "ragged mask", "cauchy", "NaN", "infinite")
PLAIN = rows_of("normal", "uniform", "bimodal gap", "k = 1", "fractional k")

# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["resident", "tiled"])
@pytest.mark.parametrize("op", OPS)
def test_every_family(op: str, variant: str) -> None:
    """All families at once, in one batch, and few of them at a kink."""
    kinks: list[Array] = []
    for seed, n, block in ((0, 33, 32), (7, 20, 16)):
        p = Problem(op, n, rows_of(*NAMES, seed=seed), eps=0.1 if seed else 0.5, tensor_eps=bool(seed), n_iters=4)
        d = draw(p)
        kinks.append(judge(p, d, run(p, d, resident(n, 4) if variant == "resident" else tiled(block))))
    share = np.concatenate(kinks).mean()
    assert share <= compare.KINK_SHARE, f"{share:.0%} of the rows were left out"


@pytest.mark.parametrize("config", [resident(1), resident(1, 1, 16), tiled(16)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rows_of_one_entry(op: str, config: LaunchConfig) -> None:
    check(Problem(op, 1, rows_of("normal", "k = 1", "k = 0", "fractional k", "all masked", "NaN")), config)


@pytest.mark.parametrize("n", [2, 7, 31, 32, 64, 100])
@pytest.mark.parametrize("op", OPS)
def test_lengths(op: str, n: int) -> None:
    """Powers of two and others, blocks as long as the row and longer, tiles that end raggedly and tiles that do not."""
    p = Problem(op, n, MIXED, n_iters=4)
    d = draw(p)
    for config in (resident(n), resident(n, 4, 2 * power(n)), tiled(max(16, power(n) // 2))):
        judge(p, d, run(p, d, config))


@pytest.mark.parametrize(("rows", "count"), [(2, 1), (2, 5), (4, 3), (4, 4), (4, 5)])
@pytest.mark.parametrize("op", OPS)
def test_rows_share_a_program(op: str, rows: int, count: int) -> None:
    """As many rows as a program takes, fewer and more; no row depends on those beside it."""
    p = Problem(op, 20, MIXED[:count])
    d = draw(p)
    found = run(p, d, resident(20, rows))
    judge(p, d, found)
    for row in range(count):
        only = Drawn(*(values[row : row + 1] for values in (d.s, d.valid, d.k, d.eps, d.g)))
        alone = run(replace(p, rows=p.rows[row : row + 1]), only, resident(20, rows))
        for mine, other in zip(found.raw, alone.raw, strict=True):
            np.testing.assert_array_equal(mine[row].cpu().double().numpy(), other[0].cpu().double().numpy())


@pytest.mark.parametrize("variant", ["resident", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_dtypes(op: str, dtype: str, variant: str) -> None:
    p = Problem(op, 37, (*MIXED, *PLAIN[:2]), dtype=dtype, eps=0.03, eps_init=4.0, eps_decay=0.3, n_iters=6)
    check(p, resident(37, 4) if variant == "resident" else tiled(32))


@pytest.mark.parametrize("op", OPS)
def test_row_strides(op: str) -> None:
    """Rows that lie apart, with NaN in between; columns are adjacent by contract."""
    for config in (resident(21, 2), tiled(16)):
        check(Problem(op, 21, MIXED, layout="padded rows", n_iters=3), config)


@pytest.mark.parametrize("op", OPS)
def test_expanded_rows(op: str) -> None:
    """A row stride of 0 for scores, mask and gradient."""
    p = Problem(op, 19, rows_of("holes", "holes", "holes"))
    d = draw(p)
    for values in (d.s, d.valid, d.g):
        values[:] = values[:1]
    t = tensors(p, d)
    one = {name: t[name][:1].expand(3, -1) for name in ("scores", "mask", "grad")}
    for config in (resident(19, 2), tiled(8)):
        if op == "soft_topk":
            lam, state = soft_topk.soft_topk_forward(one["scores"], t["k"], p.eps, one["mask"], config)
            ds, dk, _ = soft_topk.soft_topk_backward(one["grad"], one["scores"], state, p.eps, one["mask"], config)
        else:
            how = (p.n_iters, p.eps, p.eps, 1.0, True)
            lam, state = coordinate_descent.coordinate_descent_forward(one["scores"], t["k"], one["mask"], *how, 2, config)
            ds, dk = coordinate_descent.coordinate_descent_backward(
                one["grad"], one["scores"], state, t["k"], one["mask"], *how, config
            )
        judge(p, d, Found(*(x.double().cpu().numpy() for x in (lam, ds, dk)), None))


@pytest.mark.parametrize("tensor_k", [False, True])
@pytest.mark.parametrize("tensor_eps", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["resident", "tiled"])
def test_forms_of_the_arguments_of_soft_topk(tensor_k: bool, tensor_eps: bool, masked: bool, variant: str) -> None:
    p = Problem("soft_topk", 18, MIXED[1:], tensor_k=tensor_k, tensor_eps=tensor_eps, masked=masked)
    check(p, resident(18, 8) if variant == "resident" else tiled(16))


SCHEDULES = {
    "one iteration": {"n_iters": 1},
    "two": {"n_iters": 2},
    "fixed eps": {"n_iters": 6},
    "above its floor throughout": {"n_iters": 5, "eps_init": 4.0, "eps_decay": 0.9},
    "on its floor from the middle": {"n_iters": 8, "eps_init": 1.0, "eps_decay": 0.5},
    "on its floor at once": {"n_iters": 5, "eps_init": 1.0, "eps_decay": 1e-3},
    "the last eps alone": {"n_iters": 4, "eps_init": 0.8, "eps_decay": 0.5},
    "growing": {"n_iters": 4, "eps_init": 0.2, "eps_decay": 1.5},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("tensor_k", "dtype"), [(True, "float32"), (True, "float64"), (False, "float64")])
def test_schedules(name: str, tensor_k: bool, dtype: str) -> None:
    p = Problem("coordinate_descent", 18, MIXED, dtype=dtype, tensor_k=tensor_k, **SCHEDULES[name])
    d = draw(p)
    for config in (resident(18, 8), tiled(16)):
        judge(p, d, run(p, d, config))


def test_a_slow_schedule_in_float64() -> None:
    """eps walked down, and up again by the backward, through hundreds of steps: rounding must not pile up."""
    rows = rows_of("normal", "normal", "uniform", "holes")
    p = Problem("coordinate_descent", 9, rows, dtype="float64", eps=0.05, eps_init=4.0, eps_decay=0.99, n_iters=300)
    check(p, resident(9, 4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_scores_whose_ulps_matter(op: str, dtype: str) -> None:
    """Large scores and small temperatures: tau, or s + a, has few digits left."""
    rows = (*rows_of("huge scale", "offset", "cauchy"), *rows_of("huge scale", "offset", "cauchy", seed=9))
    for eps in (0.01, 1.0):
        p = Problem(op, 40, rows, dtype=dtype, eps=eps, n_iters=12, eps_init=4.0, eps_decay=0.6)
        d = draw(p)
        for config in (resident(40, 8), tiled(32)):
            judge(p, d, run(p, d, config))


def test_temperatures_far_from_one() -> None:
    """eps from the smallest number to a large one: finite, and the hard top-k at the lower end."""
    s = torch.tensor([[3.0, 1.0, 2.0, -1.0]], device=DEVICE)
    for eps in (1e-60, 1e-40, 1e-30, 1e-10):
        for config in (resident(4), tiled(4)):
            lam, state = soft_topk.soft_topk_forward(s, 2.0, eps, None, config)
            assert torch.equal(lam.cpu(), torch.tensor([[1.0, 0.0, 1.0, 0.0]])), (eps, lam)
            ds, dk, _ = soft_topk.soft_topk_backward(torch.ones_like(s), s, state, eps, None, config)
            assert torch.isfinite(ds).all() and torch.isfinite(dk).all()
            lam, state = coordinate_descent.coordinate_descent_forward(s, 2.0, None, 4, eps, eps, 1.0, False, 4, config)
            assert torch.isfinite(lam).all() and torch.isfinite(state).all(), (eps, lam, state)
    lam, _ = soft_topk.soft_topk_forward(s, 2.0, 1e30, None, resident(4))
    torch.testing.assert_close(lam.cpu(), torch.full((1, 4), 0.5))


def test_budgets_next_to_nothing() -> None:
    """k below the floor of its logarithm: as published, log k stops at 1e-20."""
    for dtype in ("float32", "float64"):
        p = Problem("coordinate_descent", 6, rows_of("normal", "normal", "normal"), dtype=dtype, n_iters=3)
        d = draw(p)
        for k in (1e-25, 1e-20, 1e-19):
            d.k[:] = rounded(np.full(3, k), compare.compute_dtype(getattr(torch, dtype)))
            for config in (resident(6), tiled(4)):
                judge(p, d, run(p, d, config))


# --- the contract at the edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [resident(5, 4), tiled(4)], ids=str)
def test_budgets_out_of_range(config: LaunchConfig) -> None:
    """A tensor k is clamped on the device, NaN makes its row NaN and no other."""
    k = [-1.0, 0.0, torch.inf, 7.0, 5.0, torch.nan, 2.0, -torch.inf]
    s = torch.randn(len(k), 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    budget = torch.tensor(k, device=DEVICE)
    g = torch.randn(len(k), 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    none = [0, 1, 7]
    lam, state = soft_topk.soft_topk_forward(s, budget, 0.3, None, config)
    ds, dk, _ = soft_topk.soft_topk_backward(g, s, state, 0.3, None, config)
    assert (lam[none] == 0).all() and (lam[2:5] == 1).all()
    assert (ds[[*none, 2, 3, 4]] == 0).all() and (dk[[*none, 2, 3, 4]] == 0).all()
    nan = torch.arange(len(k), device=DEVICE) == 5
    for x in (lam, ds, dk):
        assert torch.equal(torch.isnan(x.view(len(k), -1)).all(1), nan) and torch.equal(torch.isnan(x.view(len(k), -1)).any(1), nan)
    how = (5, 0.3, 1.0, 0.7, True)
    lam, state = coordinate_descent.coordinate_descent_forward(s, budget, None, *how, 5, config)
    ds, dk = coordinate_descent.coordinate_descent_backward(g, s, state, budget, None, *how, config)
    assert (lam[none] == 0).all() and (ds[none] == 0).all() and (dk[[*none, 2, 3]] == 0).all()
    assert dk[4] != 0  # k = n lies in the range itself
    full = torch.full_like(budget, 5.0)
    wanted, _ = coordinate_descent.coordinate_descent_forward(s, full, None, *how, 5, config)
    assert torch.equal(lam[2:5], wanted[2:5])
    for x in (lam, ds, dk):
        assert torch.equal(torch.isnan(x.view(len(k), -1)).all(1), nan) and torch.equal(torch.isnan(x.view(len(k), -1)).any(1), nan)


@pytest.mark.parametrize("config", [resident(4, 4), tiled(4)], ids=str)
def test_temperatures_out_of_range(config: LaunchConfig) -> None:
    eps = torch.tensor([0.5, 0.0, -1.0, torch.nan, torch.inf], device=DEVICE)
    s = torch.arange(20.0, device=DEVICE).view(5, 4)
    lam, state = soft_topk.soft_topk_forward(s, 2.0, eps, None, config)
    made = soft_topk.soft_topk_backward(torch.ones_like(s), s, state, eps, None, config)
    for x in (lam, *made):
        assert torch.isfinite(x[0]).all() and torch.isnan(x[1:]).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("config", [resident(5, 2, 16), tiled(8)], ids=str)
def test_nothing_to_do(shape: tuple[int, int], config: LaunchConfig) -> None:
    s = torch.empty(shape, device=DEVICE)
    k = torch.ones(shape[0], device=DEVICE)
    lam, state = soft_topk.soft_topk_forward(s, k, k, None, config)
    made = soft_topk.soft_topk_backward(s, s, state, k, None, config)
    how = (3, 0.1, 0.1, 1.0, True)
    other, states = coordinate_descent.coordinate_descent_forward(s, k, None, *how, 2, config)
    more = coordinate_descent.coordinate_descent_backward(s, s, states, k, None, *how, config)
    for x in (lam, other, made[0], more[0]):
        assert x.shape == shape
    for x in (made[1], made[2], more[1]):
        assert x.shape == shape[:1] and (x == 0).all()


def test_what_cannot_be_launched_says_why() -> None:
    s = torch.zeros(1, 8, device=DEVICE)
    for config, word in (
        (LaunchConfig("resident", 4, 1, 1, 1), "at least 8"),
        (LaunchConfig("eager", 8, 1, 1, 1), "variant"),
        (LaunchConfig("tiled", 0, 1, 1, 1), "block"),
        (LaunchConfig("resident", 24, 1, 1, 1), "block"),
        (LaunchConfig("resident", 8, 3, 1, 1), "rows_per_program"),
    ):
        with pytest.raises(ValueError, match=word):
            soft_topk.soft_topk_forward(s, 1.0, 0.1, None, config)
        with pytest.raises(ValueError, match=word):
            coordinate_descent.coordinate_descent_forward(s, 1.0, None, 2, 0.1, 0.1, 1.0, False, 2, config)


# --- properties of the launches themselves ---------------------------------------------------------------------------


def bits(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("config", [resident(23, 8), tiled(16)], ids=str)
@pytest.mark.parametrize("n_iters", [1, 2, 4])
def test_every_number_of_segments_gives_the_same_bits(config: LaunchConfig, n_iters: int) -> None:
    p = Problem("coordinate_descent", 23, MIXED, eps_init=1.0, eps_decay=0.8, n_iters=n_iters)
    d = draw(p)
    t = tensors(p, d)
    how = (n_iters, p.eps, 1.0, 0.8, True)
    found = set()
    for segments in range(1, n_iters + 1):
        lam, states = coordinate_descent.coordinate_descent_forward(t["scores"], t["k"], t["mask"], *how, segments, config)
        assert states.shape == (len(p.rows), segments)
        assert not torch.isnan(states[:4]).any() and torch.isnan(states[4]).all()  # every state is written; row 4 holds a NaN
        ds, dk = coordinate_descent.coordinate_descent_backward(t["grad"], t["scores"], states, t["k"], t["mask"], *how, config)
        found.add((bits(lam), bits(states[:, -1]), bits(ds), bits(dk)))
    assert len(found) == 1


@pytest.mark.parametrize("rows_per_program", [1, 4])
def test_a_long_tail_whose_threshold_moves_far(rows_per_program: int) -> None:
    """At a constant eps all iterations but the first are the tail: its sums become states in batches, around other centres.

    Rows that move by many eps stand beside one that hardly moves and one that is NaN: no row's states depend on its neighbours.
    """
    n, k, n_iters, eps = 48, 5.0, 70, 0.02
    s = torch.randn(4, n, generator=torch.Generator().manual_seed(3))
    s[1] *= 0.01
    s[2, 7] = torch.nan
    s[3] += 0.5
    whole = [0, 1, 3]
    rows = s[whole].double().numpy()
    wanted = oracles.coordinate_descent_numpy(rows, k, n_iters, eps)[1].T
    top = -rows.max(axis=1, keepdims=True)
    moved = (wanted[:, 0] - wanted[:, -1]) / eps
    assert moved[[0, 2]].min() > 2 * math.log(coordinate_descent.REACH.value) > 2 * moved[1]
    how = (n_iters, eps, eps, 1.0, False)
    config = resident(n, rows_per_program)
    # each iteration adds a few roundings of a sum's logarithm and of a, and none is made larger by those after it
    limit = n_iters * 4 * 2.0**-24 * (np.abs(wanted).max() + eps * math.log(n))
    last = set()
    for segments in (n_iters, 17, 1):
        _, states = coordinate_descent.coordinate_descent_forward(s.to(DEVICE), k, None, *how, segments, config)
        assert torch.isnan(states[2]).all()
        found = states[whole].double().cpu().numpy()
        ends = np.cumsum([n_iters // segments + (i < n_iters % segments) for i in range(segments)]) - 1
        # where no entry is clamped yet the state may be minus the largest score, which clamps none either
        quiet = (found == top) & (wanted[:, ends] <= top)
        assert np.where(quiet, 0.0, np.abs(found - wanted[:, ends])).max() <= limit
        last.add(bits(states[:, -1]))
        if segments == n_iters:
            alone = [
                coordinate_descent.coordinate_descent_forward(row[None].to(DEVICE), k, None, *how, n_iters, config)[1] for row in s
            ]
            assert bits(torch.cat(alone)) == bits(states)
    assert len(last) == 1


@pytest.mark.parametrize("config", [resident(8), tiled(8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_far_above_every_threshold(dtype: torch.dtype, config: LaunchConfig) -> None:
    """It is clamped in every iteration: weight 1, gradient 0, and of whatever size it is the same to all others, to the bit."""
    found = []
    for large in (1e3, 1e30, torch.finfo(dtype).max):
        s = torch.tensor([[0.3, large, -0.2, 0.1, 0.25, -1.0, 0.6, 0.0]], dtype=dtype, device=DEVICE)
        grad = torch.linspace(-1.0, 1.0, 8, dtype=dtype, device=DEVICE)[None]
        k = torch.full((1,), 3.0, dtype=dtype, device=DEVICE)
        how = (12, 0.1, 1.0, 0.7, False)
        lam, states = coordinate_descent.coordinate_descent_forward(s, k, None, *how, 12, config)
        ds, dk = coordinate_descent.coordinate_descent_backward(grad, s, states, k, None, *how, config)
        assert lam[0, 1] == 1.0 and ds[0, 1] == 0.0
        assert torch.isfinite(ds).all() and ds.abs().sum() > 0.0 and dk is not None
        found.append([bits(x) for x in (lam, states, ds, dk)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("op", OPS)
def test_the_same_call_twice_gives_the_same_bits(op: str) -> None:
    p = Problem(op, 40, MIXED, tensor_eps=op == "soft_topk", n_iters=3)
    d = draw(p)
    for config in (resident(40, 8), tiled(32)):
        first, second = run(p, d, config), run(p, d, config)
        assert [bits(x) for x in first.raw] == [bits(x) for x in second.raw]


@pytest.mark.parametrize("op", OPS)
def test_the_variants_agree(op: str) -> None:
    """Two variants of one operator differ by no more than two answers within the bound may."""
    p = Problem(op, 60, rows_of("normal", "uniform", "cauchy", "holes", "tiny scale", "k = 1"), eps=0.3, n_iters=4)
    d = draw(p)
    truth = truth_of(p, d)
    plain = plain_errors(p, d, truth)
    one, other = run(p, d, resident(60, 8)), run(p, d, tiled(32))
    limit = 2 * compare.bound(plain[0], truth.error_lam, compare.storage_floor(truth.lam, torch.float32), torch.float32)
    assert (compare.row_errors(one.lam, other.lam) <= limit).all()
    assert truth.grad_scores is not None
    stored = compare.storage_floor(truth.grad_scores, torch.float32)
    limit = 2 * (compare.bound(plain[1], truth.error_scores, stored, torch.float32) + truth.slack_scores)
    assert (compare.row_errors(one.grad_scores, other.grad_scores) <= limit).all()
    # and what one variant leaves behind serves the other
    for forward, backward in ((resident(60), tiled(32)), (tiled(32), resident(60, 2))):
        judge(p, d, run(p, d, forward, backward))


def test_the_exact_solver_stops() -> None:
    """The threshold is found in a few sweeps, not by running into the bound of the loop: the budget is met to rounding."""
    rows = tuple((name, seed) for name in ("normal", "cauchy", "ties", "huge scale", "bimodal gap") for seed in range(4))
    p = Problem("soft_topk", 64, rows, eps=0.05)
    d = draw(p)
    found = run(p, d, resident(64, 4))
    assert (np.abs(found.lam.sum(axis=1) - d.k) <= 2.0**-18 * np.maximum(d.k, 1.0)).all()


@pytest.mark.parametrize("op", OPS)
def test_every_output_is_guarded(op: str, guarded: Guarded) -> None:
    p = Problem(op, 20, rows_of("normal"), n_iters=3)
    run(p, draw(p), resident(32, 1))
    shapes = [tuple(view.shape) for _, view in guarded.made]
    rows = shapes[0][0]
    # the weights and what is kept; the gradients of scores and of k
    assert shapes.count((rows, 20)) == 2 and (rows,) in shapes and len(shapes) >= 4


def test_the_guard_bands_would_tell(guarded: Guarded) -> None:
    """The watchman himself: a write one element beyond an output is seen."""
    out = torch.ops.aten.clone(guarded.empty((2, 3), torch.float32, torch.device(DEVICE)))
    assert torch.isnan(out).all()
    memory, view = guarded.made[-1]
    assert view.shape == (2, 3)
    memory[GUARD + 6] = 0.0
    with pytest.raises(AssertionError, match="beside"):
        guarded.check()
    guarded.made.clear()


# --- drawn at random -------------------------------------------------------------------------------------------------


@st.composite
def problems(choose: Callable[..., Any]) -> tuple[Problem, LaunchConfig]:
    op = choose(st.sampled_from(OPS))
    n = choose(st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48]))
    names = choose(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
    seed = choose(st.integers(0, 2**16))
    p = Problem(
        op,
        n,
        rows_of(*names, seed=seed),
        dtype=choose(st.sampled_from(DTYPES)),
        eps=choose(st.sampled_from([0.02, 0.1, 0.37, 1.0, 5.0])),
        tensor_k=choose(st.booleans()),
        tensor_eps=choose(st.booleans()) and op == "soft_topk",
        masked=choose(st.booleans()),
        layout=choose(st.sampled_from(["contiguous", "padded rows"])),
        n_iters=choose(st.integers(1, 5)),
        eps_init=choose(st.sampled_from([None, 1.0, 4.0])),
        eps_decay=choose(st.sampled_from([1.0, 0.7, 0.3])),
    )
    if op == "coordinate_descent":
        p = Problem(**{**p.__dict__, "segments": choose(st.integers(1, p.n_iters))})
    variant = choose(st.sampled_from(["resident", "tiled"]))
    if variant == "tiled":
        return p, tiled(choose(st.sampled_from([16, 32, 64])))
    return p, resident(n, choose(st.sampled_from([1, 2, 4])), choose(st.sampled_from([0, 64])))


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problems())
def test_drawn_problems(drawn: tuple[Problem, LaunchConfig]) -> None:
    check(*drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_compute_types(dtype: torch.dtype) -> None:
    compute, _ = launch.compute_dtypes(dtype)
    assert compute == (torch.float64 if dtype == torch.float64 else torch.float32)


# --- rows that programs share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [split(32, 2), split(16, 2), split(32, 4)], ids=["held", "in tiles", "more than needed"])
def test_rows_that_programs_share(config: LaunchConfig) -> None:
    """Parts that stay in registers, that are re-read, and programs for which no column is left; odd rows among the others."""
    for rows in (rows_of("ragged mask", "NaN"), rows_of("infinite", "all masked")):
        check(Problem("soft_topk", 40, rows, eps=0.3, tensor_eps=True), config)


def test_shared_rows_in_float64() -> None:
    """A sum of 64 bits travels in two words."""
    check(Problem("soft_topk", 40, rows_of("normal"), dtype="float64"), split(32, 2))


def test_sharing_changes_no_more_than_rounding() -> None:
    """The threshold does not depend on how many programs look for it."""
    p = Problem("soft_topk", 60, rows_of("normal"), eps=0.03)
    d = draw(p)
    alone, shared = (run(p, d, config).raw[1].double().sum(1) for config in (resident(60), split(32, 2)))
    assert torch.allclose(alone, shared, rtol=0.0, atol=1e-6 * 0.03 + 2e-7)


def test_sweeps_are_counted() -> None:
    """Few on normal scores, none where nothing is to be solved."""
    s = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    s[1] = -torch.inf
    for config in (resident(64), tiled(32), split(32, 2)):
        sweeps = soft_topk.count_sweeps(s, 9.0, 0.1, None, config).tolist()
        assert 1 <= sweeps[0] <= 8 and sweeps[1] == 0 and 1 <= sweeps[2] <= 8, (config, sweeps)


def test_rows_that_share_a_program_need_no_more_sweeps() -> None:
    """Each does with the approximant of the logarithm, beside itself, what a row that is alone does with the logarithm.

    They begin at a better guess, so that in all they need fewer. The worst of these rows took 29 in place of 13 while steps were
    taken by the approximant where F is far below k, where it is far too short.
    """
    s = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alone = soft_topk.count_sweeps(s, 9.0, 0.03, None, resident(64))
    beside = soft_topk.count_sweeps(s.repeat_interleave(2, 0), 9.0, 0.03, None, resident(64, rows=2))[::2]
    assert beside.sum() < alone.sum() and beside.max() <= alone.max() + 2, (alone.tolist(), beside.tolist())


@pytest.mark.parametrize("config", [resident(20), resident(20, rows=2), tiled(16)], ids=str)
@pytest.mark.parametrize("large", [1.6e38, 3.4e38, torch.finfo(torch.float32).max])
def test_a_bracket_wider_than_the_type_is_halved_all_the_same(large: float, config: LaunchConfig) -> None:
    """Scores whose differences are just finite, or not: a bound of the bracket, with what rounding may have moved it by, is not.

    A solver that halved an infinite bracket did all its sweeps and gave NaN, as did one that began at an infinite distance.
    """
    s = torch.tensor([[large] * 10 + [-large] * 10, [-large] * 10 + [large] * 10], device=DEVICE)
    lam, threshold = soft_topk.soft_topk_forward(s, 5.0, 0.03, None, config)
    # lam is exp(-log 2): half an ulp of the logarithm and one of the exponential, and as much again; it was exact where it is to be
    torch.testing.assert_close(lam, torch.where(s > 0, 0.5, 0.0), rtol=0.0 if large == 1.6e38 else 2**-22, atol=0.0)
    grad = torch.arange(20.0, device=DEVICE).expand(2, 20).contiguous()
    ds = soft_topk.soft_topk_backward(grad, s, threshold, 0.03, None, config)[0]
    mean = torch.where(s > 0, grad, 0.0).sum(1, keepdim=True) / 10
    assert torch.equal(ds[s <= 0], torch.zeros(20, device=DEVICE))
    torch.testing.assert_close(ds[s > 0], (0.5 / 0.03 * (grad - mean))[s > 0], rtol=1e-5, atol=1e-4)


FAR = {
    "-1e4": (-1e4, 0.0),
    "-1e9": (-1e9, 0.0),
    "finfo.min": (torch.finfo(torch.float32).min, 0.0),
    "both ends": (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max),
    "1e6": (0.0, 1e6),
}


@pytest.mark.parametrize("config", [resident(96), resident(96, rows=2), tiled(32), split(64, 2)], ids=str)
@pytest.mark.parametrize("far", FAR)
def test_scores_far_off_cost_no_sweeps(far: str, config: LaunchConfig) -> None:
    """A model masks with finfo.min or -1e4, and keeps with finfo.max: the others have the threshold as soon as without them.

    From the moments of such a row the solver bisected from one end of the type to the other, in 175 sweeps where 5 do.
    """
    low, high = FAR[far]
    # Triton's interpreter repeats rows that programs share once an exchange
    rows, budgets = (2, (9.5,)) if config.variant == "split" else (4, (9.5, 30.0))
    s = torch.randn(rows, 96, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    draw_far = torch.rand(rows, 96, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    masked, kept = (draw_far < 0.4) & (low != 0.0), (draw_far > 0.95) & (high != 0.0)
    far_off = torch.where(kept, high, torch.where(masked, low, s))
    infinite = torch.where(kept, torch.inf, torch.where(masked, -torch.inf, s))
    for k in budgets:
        sweeps, fewest = (soft_topk.count_sweeps(x, k, 0.1, None, config) for x in (far_off, infinite))
        assert (sweeps <= fewest + 3).all(), (sweeps.tolist(), fewest.tolist())
        lam, wanted = (soft_topk.soft_topk_forward(x, k, 0.1, None, config)[0] for x in (far_off, infinite))
        # each sum is k to 2^-20 of what is unsaturated, and an exponent of up to 80 is rounded
        torch.testing.assert_close(lam, wanted, rtol=2 * 2**-20 + 80 * 2**-23, atol=1e-37)


# --- rows that are re-read -------------------------------------------------------------------------------------------


def test_lam_is_stored_where_the_last_sweep_did_not() -> None:
    """At a wide temperature one long step ends at the root: the sweep that finds so has not stored lam, for it was not expected."""
    p = Problem("soft_topk", 160, rows_of(*["normal"] * 8), eps=1.0)
    check(p, tiled(32))
    check(replace(p, eps=5.0), tiled(32))


def unlike_its_beginning(kind: str) -> torch.Tensor:
    """Four rows of 160 scores of which the first tile tells little, or nothing."""
    s = torch.randn(4, 160, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if kind == "masked":
        s[:, :48] = -torch.inf
    elif kind == "all the same":
        s[:, :48] = 0.25
    return s


@pytest.mark.parametrize("kind", ["normal", "masked", "all the same"])
def test_a_first_tile_that_is_unlike_the_rest(kind: str) -> None:
    """What comes out is that of a row that stays in registers, up to rounding."""
    s = unlike_its_beginning(kind)
    cases = [(20.0, 0.03, tiled(32)), (9.5, 1.0, tiled(32)), (150.0, 0.3, tiled(32))]
    if kind == "normal":
        # the interpreter takes long over rows that are shared
        cases.append((20.0, 0.03, split(32, 2)))
    for k, eps, config in cases:
        whole, exact = soft_topk.soft_topk_forward(s, k, eps, None, resident(160))
        lam, threshold = soft_topk.soft_topk_forward(s, k, eps, None, config)
        # a threshold is known to some ulps of itself, of which lam sees as many epsilons as eps has room for
        ulps = 8 * torch.finfo(torch.float32).eps * (1.0 + exact[:, :1].abs().clamp(max=1e30) / eps)
        assert ((lam - whole).abs() <= ulps * whole.clamp(min=1e-6)).all(), (kind, k, eps, config)
        assert ((threshold.sum(1) - exact.sum(1)).abs() <= eps * ulps[:, 0]).logical_or(threshold[:, 0] == exact[:, 0]).all()


def test_lam_belongs_to_the_threshold() -> None:
    """The backward goes by the threshold alone."""
    s = torch.randn(8, 160, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for k, eps in ((20.0, 0.3), (22.5, 1.0), (30.0, 3.0)):
        lam, threshold = soft_topk.soft_topk_forward(s, k, eps, None, tiled(32))
        hi, lo = threshold.double().split(1, dim=1)
        expected = ((s.double() - hi - lo) / eps).clamp(max=0.0).exp()
        # exp's argument is rounded three times
        bound = torch.finfo(torch.float32).eps * (4.0 + 2.0 * ((s.double() - hi) / eps).abs())
        assert ((lam.double() - expected).abs() <= bound * expected).all(), (k, eps)
        # the solver stops at 2**-20 of the unsaturated mass, and rounding adds less than as much
        assert ((lam.double().sum(1) - k).abs() <= 2 * 2.0**-20 * k).all(), (k, eps)


# --- how rows lie in threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "itemsize", "strides", "vec", "unit"),
    [
        (8192, 4, (8192, 8192), 4, 1),  # Triton sees multiples of 16 itself
        (8192, 4, (8192, 8200), 4, 4),
        (200, 4, (200, 0), 4, 4),
        (200, 2, (200, 200), 8, 8),
        (1500, 2, (1500, 1500), 4, 4),
        (1500, 8, (1500, 1500), 2, 2),
        (8190, 4, (8190, 0), 2, 2),
        (201, 4, (201, 0), 1, 1),
        (200, 4, (203, 0), 4, 1),  # the same sums as rows that lie side by side
        (0, 4, (0, 0), 4, 1),
    ],
)
def test_rows_are_loaded_as_wide_as_they_are_aligned(n: int, itemsize: int, strides: tuple[int, ...], vec: int, unit: int) -> None:
    block = max(next_power_of_2(n), 16)
    found = launch.tiles(LaunchConfig("resident", block, 1, 1), 100, n, itemsize, None, strides)
    assert (found.vec, found.unit, found.reps * found.lanes * found.vec) == (vec, unit, block)


def test_a_thread_of_a_small_tile_has_a_pair_of_columns() -> None:
    """Of which Triton may give it one, in tiles that are known by their single repetition."""
    found = launch.tiles(LaunchConfig("resident", 64, 1, 4), 100, 33, 4, None, (33,))
    assert (found.reps, found.lanes, found.vec, found.unit) == (1, 32, 2, 1)


@triton.jit
def _folded(x_ptr, out_ptr, REPS: tl.constexpr, VEC: tl.constexpr):
    x = tl.load(x_ptr + columns(REPS, 1, VEC))
    tl.store(out_ptr + tl.arange(0, 1), row_sum(x))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's compiler decides in which order a thread adds")
@pytest.mark.parametrize("vec", [1, 2, 4])
def test_a_thread_adds_up_four_sums_side_by_side(vec: int) -> None:
    """64 scores are four sums of 16, and not one of 64, which rounds four times as often."""
    x = torch.rand(64, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(1)
    _folded[(1,)](x, out, 64 // vec, vec)
    chains = functools.reduce(torch.add, x.view(16, 4))
    assert out.item() == functools.reduce(torch.add, chains).item()
