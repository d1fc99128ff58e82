"""Both operators in plain torch: the backend for CPU tensors (and, slowly, for any device).

The equations are those of the Triton kernels.

``soft_topk``: ``lam_i = min(1, exp((s_i - tau)/eps))`` with the threshold tau such that ``sum(lam) = k``; bracketed Newton on
``log F``, ``F(tau) = sum(lam)``.

``coordinate_descent``: ``a_{t+1} = eps_t (log k - logsumexp(min(s, -a_t)/eps_t))``, one scalar a row, as published in
CoLT5-attention 0.9.0 (arXiv:2303.09752) with the row b eliminated.

How it is made quick without a compiler:

- Work goes in blocks of rows that stay in the cache; every buffer of a block is allocated once a call and reused in place.
- A sweep of ``soft_topk`` does not exponentiate: ``E_i = exp((s_i - anchor)/eps)`` is kept, and while tau stays within half an
  eps of the anchor a sweep only scales, compares and adds. The anchor is an unevaluated sum hi + lo, so that the differences
  are right to the last bit wherever the scores lie.
- ``exp2`` is used instead of ``exp`` (it is two to three times as fast in torch).
- Scalars of a row (tau, brackets, logarithms) are float64 tensors of shape ``[rows, 1]``; there are few of them.

Why results do not depend on the size of a block: each row's sums are over that row alone in an order that depends on n only
(:func:`_row_sum`), decisions are taken row by row, and the buffers are padded so that ``exp2`` meets every element in its
vector loop (:func:`_padded`; its scalar tail rounds differently).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import LaunchConfig

VARIANTS = ("eager", "inductor")

_LOG2E = 1.4426950408889634
_INF = float("inf")

_GRAIN = 32768
"""Elements below which torch runs an elementwise operation on one thread (``at::internal::GRAIN_SIZE``)."""

_VECTOR = 32
"""Elements that torch's vector loops take at a time, at most (two 512-bit registers of float32)."""

_SUM_CHUNK = 8192
"""Rows longer than this are added chunk by chunk, so that one row is added as many are."""

_FREE_SWEEPS = 8
"""Newton sweeps of a whole block with no bracket but the first; scores that are near normal need 3 to 5."""

_FUSED_SWEEPS = 2
"""Sweeps of one call of the compiled variant."""

_GUARDED_SWEEPS = 20
"""Bracketed sweeps of the rows that are left; what is left then (scores so large that eps is below their ulp) is
sorted."""

_SHORT = 128
"""Rows up to this length are sorted at once: that takes fewer passes than bisection."""

_REACH = 1.5
"""How far from its anchor, in units of eps/log2(e), a threshold may be before the exponentials are computed anew."""

_TOLERANCE = 16.0
"""Residual, in units of ``finfo.eps`` times U, at which a row is done. U is a sum of n terms, each within about 3 ulp
(one rounding of the difference, one of the scaled exponent, half an ulp of exp2, one of the scaling), added in a
tree (error growing with log n,
a few ulp): its noise is below 8 ulp. 16 ulp is safely above it, and one Newton step from there lands within the
noise."""

_FLOOR = 2.0**-7
"""Share of ``min(k, 1)`` below which U need not be resolved: 16 ulp of it is less than half an ulp of an entry with
lam = 1."""


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads for the duration of a call; 0 leaves it alone."""
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(config: LaunchConfig) -> None:
    if config.variant not in VARIANTS:
        raise ValueError(f"variant is {config.variant!r}; the torch backend has {' and '.join(map(repr, VARIANTS))}")


def _blocks(rows: int, config: LaunchConfig) -> Iterator[slice]:
    step = max(1, config.rows_per_program)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _padded(count: int) -> int:
    """Elements to allocate for ``count`` so that every thread's share is a whole number of vectors."""
    tasks = max(1, min(torch.get_num_threads(), -(-count // _GRAIN)))
    step = _VECTOR * tasks
    return -(-count // step) * step


class _Buffer(NamedTuple):
    """A block's scratch memory: ``view`` is [rows, n], ``flat`` is the same memory and its padding."""

    view: Tensor
    flat: Tensor


class _Memory(threading.local):
    """Scratch memory that a thread keeps from one call to the next: fresh pages cost as much as two passes over
    them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_memory = _Memory()

_KEPT_BYTES = 8 << 20
"""Buffers up to this size are kept; larger ones go when the call ends."""


class _Workspace:
    """The buffers of one call, by name; the last block, with fewer rows, uses a part of them."""

    def __init__(self, rows: int, n: int, like: Tensor) -> None:
        self.size, self.n, self.like = _padded(rows * n), n, like
        self.own: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> _Buffer:
        count = rows * self.n
        padded = _padded(count)
        size = max(self.size, padded)
        memory = self.own.get(name)
        if memory is None or memory.numel() < padded:
            key = (name, self.like.dtype, self.like.device)
            memory = _memory.kept.get(key)
            if memory is None or memory.numel() < size:
                # zeros, since exp2 runs over the padding too
                memory = torch.zeros(size, dtype=self.like.dtype, device=self.like.device)
                if size * memory.element_size() <= _KEPT_BYTES:
                    _memory.kept[key] = memory
            self.own[name] = memory
        return _Buffer(memory[:count].view(rows, self.n), memory[:padded])


def _aligned(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """``function`` of a few scalars, the same bits wherever among them one stands (see the module's docstring)."""
    count = x.numel()
    memory = torch.zeros(_padded(count), dtype=x.dtype, device=x.device)
    result = memory[:count].view(x.shape)
    result.copy_(x)
    function(memory, out=memory)
    return result


def _row_sum(x: Tensor) -> Tensor:
    """Sums of contiguous rows, [R, n] -> [R, 1], added in an order that depends on n alone."""
    n = x.shape[-1]
    if n <= _SUM_CHUNK:
        return x.sum(-1, keepdim=True)
    chunks = n // _SUM_CHUNK
    head = x[:, : chunks * _SUM_CHUNK].unflatten(-1, (chunks, _SUM_CHUNK)).sum(-1)
    total = _row_sum(head)
    if chunks * _SUM_CHUNK < n:
        total = total + x[:, chunks * _SUM_CHUNK :].sum(-1, keepdim=True)
    return total


def _column(value: float | Tensor, rows: slice, like: Tensor) -> Tensor:
    """A number or a tensor [R] as float64 [rows, 1]."""
    if isinstance(value, Tensor):
        return value[rows].to(torch.float64).unsqueeze(-1)
    return torch.full((rows.stop - rows.start, 1), float(value), dtype=torch.float64, device=like.device)


def _scores(scores: Tensor, mask: Tensor | None, rows: slice, compute: torch.dtype) -> Tensor:
    """One block of scores in the compute dtype, -inf where masked. A view of the caller's memory where it can be:
    only read it."""
    x = scores[rows].to(compute)
    if mask is not None:
        x = torch.where(mask[rows], x, -_INF)
    return x


# --- compiled variants -----------------------------------------------------------------------------------------------

_RECOMPILES = 1024

_compiled: dict[tuple[Callable[..., Any], torch.dtype, bool, bool], Callable[..., Any]] = {}


def _inductor(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``function`` compiled by Inductor for blocks such as ``x``, once a process. Whatever fails while compiling is
    raised, never hidden.

    Sizes are dynamic; only the dtype and whether there is one row, or one column, make a difference. Each such case
    is a function of its own, for Dynamo counts recompilations by code object. It compiles anew for strides of the
    caller's that it has not met, too, and its limit on that, an error here, is lifted: there are few, and each is right.
    """
    key = (function, x.dtype, x.shape[0] == 1, x.shape[1] == 1)
    if key not in _compiled:
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        fused = torch.compile(own, backend="inductor", fullgraph=True, dynamic=True)

        def unlimited(*arguments: Tensor) -> Any:
            with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
                return fused(*arguments)

        _compiled[key] = unlimited
    return _compiled[key]


def _fused_newton(
    x: Tensor,
    scale: Tensor,
    hi: Tensor,
    lo: Tensor,
    done: Tensor,
    lower: Tensor,
    upper: Tensor,
    k: Tensor,
    budget: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A few sweeps, each with the step that follows from it: (hi, lo, done, lam)."""
    wide = scale.double()
    unit = torch.finfo(x.dtype).eps
    floor = _floor(budget, unit)
    for _ in range(_FUSED_SWEEPS):
        d = (x - hi) - lo
        saturated = d >= 0
        count = saturated.to(x.dtype).sum(-1, keepdim=True)
        mass = torch.where(saturated, 0.0, torch.exp2(d * scale)).sum(-1, keepdim=True)
        tau = hi.double() + lo.double()
        left, right = (lower - tau) * wide, (upper - tau) * wide
        offset, done, _, _ = _update(count, mass, k, budget, floor, torch.zeros_like(tau), done, left, right, False, unit)
        hi, lo = _moved(hi, lo, offset / wide)
    return hi, lo, done, torch.exp2(((x - hi) - lo) * scale).clamp_max(1.0)


def _fused_values(x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor) -> Tensor:
    """lam at the threshold hi + lo."""
    return torch.exp2(((x - hi) - lo) * scale).clamp_max(1.0)


def _fused_gradient(g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, gbar, sum of (s - tau) ds)."""
    d = (x - hi) - lo
    inside = (d < 0) & (d > -_INF)
    lam = torch.where(inside, torch.exp2(d * scale), 0.0)
    mass = lam.sum(-1, keepdim=True)
    weighted = torch.where(lam > 0, lam * g, 0.0).sum(-1, keepdim=True)
    mean = torch.where(mass > 0, weighted / mass, 0.0)
    ds = torch.where(inside, lam * (g - mean) * inverse, 0.0)
    return ds, mean, torch.where(inside, ds * d, 0.0).sum(-1, keepdim=True)


def _fused_next(x: Tensor, top: Tensor, logk: Tensor, barrier: Tensor, eps: Tensor, scale: Tensor) -> Tensor:
    """-a_{t+1} from -a_t."""
    shift = torch.minimum(top, barrier)
    total = torch.exp2((torch.minimum(x, barrier) - shift) * scale).sum(-1, keepdim=True)
    return ((torch.log(total.double()) - logk) * eps + shift.double()).to(x.dtype)


def _fused_previous(
    ds: Tensor,
    x: Tensor,
    top: Tensor,
    k: Tensor,
    barrier: Tensor,
    after: Tensor,
    chain: Tensor,
    eps: Tensor,
    scale: Tensor,
) -> Tensor:
    """Adds iteration t to ds, in place; A_t from A_{t+1}. ``barrier`` is -a_t, ``after`` is -a_{t+1}."""
    shift = torch.minimum(top, barrier)
    unit = torch.exp((shift.double() - after.double()) / eps) / k
    clamped = x > barrier
    ds.add_(torch.where(clamped, 0.0, torch.exp2((x - shift) * scale) * (-chain * unit).to(x.dtype)))
    return chain * unit * clamped.to(x.dtype).sum(-1, keepdim=True)


# --- soft_topk: the sums of a sweep ----------------------------------------------------------------------------------


class _EagerSums:
    """M and U of a block of rows near an anchor hi + lo, without an exponential a sweep.

    Offsets are in units of eps/log2(e): the threshold is ``hi + lo + offset/scale``.
    """

    def __init__(self, x: Tensor, scale: Tensor, space: _Workspace) -> None:
        rows = x.shape[0]
        self.x, self.scale = x, scale
        self.kept, self.work, self.count = space("kept", rows), space("work", rows), space("count", rows)
        self.few = torch.zeros(_padded(rows), dtype=torch.float64, device=x.device)
        self.few_view = self.few[:rows].view(rows, 1)

    def anchor(self, hi: Tensor, lo: Tensor) -> None:
        """Keeps exp((s - hi - lo)/eps); an overflow to inf is a saturated entry."""
        kept = self.kept.view
        torch.sub(self.x, hi, out=kept)
        kept.sub_(lo)
        kept.mul_(self.scale)
        self.kept.flat.exp2_()

    def sums(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """(M, -U), [rows, 1] in the compute dtype, at the threshold anchor + offset."""
        work, count = self.work.view, self.count.view
        # negated, because torch.threshold keeps what is above its threshold
        torch.mul(self.kept.view, self._factor(offset).neg_(), out=work)
        torch.le(work, -1.0, out=count)
        torch.threshold_(work, -1.0, 0.0)
        return _row_sum(count), _row_sum(work)

    def _factor(self, offset: Tensor) -> Tensor:
        torch.neg(offset, out=self.few_view)
        self.few.exp2_()
        return self.few_view.to(self.x.dtype, copy=True)

    def values(self, offset: Tensor, out: Tensor) -> None:
        """lam at the threshold anchor + offset."""
        work = out if out.dtype == self.x.dtype else self.work.view
        torch.mul(self.kept.view, self._factor(offset), out=work)
        work.clamp_max_(1.0)
        if work is not out:
            out.copy_(work)


def _scale(eps: Tensor, dtype: torch.dtype) -> Tensor:
    """log2(e)/eps, finite in the compute dtype."""
    return (_LOG2E / eps).clamp_max(torch.finfo(dtype).max).to(dtype)


def _moved(hi: Tensor, lo: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The unevaluated sum hi + lo + step (float64) as a pair of the compute dtype (a two-sum)."""
    rest = lo.double() + step
    new_hi = (hi.double() + rest).to(hi.dtype)
    new_lo = ((hi.double() - new_hi.double()) + rest).to(hi.dtype)
    return new_hi, new_lo


def _moments(x: Tensor, work: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of rows of ``count`` entries, good enough to start from."""
    count = count.to(x.dtype)
    mean = _row_sum(x) / count
    torch.sub(x, mean, out=work)
    deviation = torch.linalg.vector_norm(work, dim=-1, keepdim=True) / count.sqrt()
    return mean.double(), deviation.double()


def _moments_of_finite(x: Tensor, finite: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the finite entries. A row that has no others gets the very bits of :func:`_moments`, so that its
    result does not depend on its neighbours."""
    count = count.to(x.dtype)
    mean = _row_sum(torch.where(finite, x, 0.0)) / count
    away = torch.where(finite, x - mean, 0.0)
    deviation = torch.linalg.vector_norm(away, dim=-1, keepdim=True) / count.sqrt()
    return mean.double(), deviation.double()


def _solve_by_sorting(x: Tensor, k: Tensor, eps: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold of rows with any scores, in a number of sweeps that is the logarithm of n.

    Binary search among the sorted scores v_1 >= v_2 >= … for the first j with ``F(v_j) >= k``. Then the j - 1 scores
    above v_j are saturated and
    ``tau = v_j + eps log(sum_{i >= j} exp((v_i - v_j)/eps) / (k - (j - 1)))``. It is returned as that pair: v_j may
    be too
    large for the sum to be a number of its own.

    Args:
        x: [R, n], no NaN, +inf allowed.
        k: float64 [R, 1], between the number of +inf and the number of entries above -inf.
    """
    order = x.sort(dim=-1, descending=True).values
    n = x.shape[-1]
    infinite = (order == _INF).sum(-1, keepdim=True)
    position = torch.arange(n, device=x.device)
    low = infinite.clone()  # the first candidate, counted from 0
    high = (order > -_INF).sum(-1, keepdim=True) - 1  # F(v_high) >= k, or k is above it by rounding alone
    while bool((low < high).any()):
        middle = (low + high) // 2
        d = order - order.gather(-1, middle)
        mass = torch.where(d >= 0, 1.0, torch.exp2(d * scale)).double().sum(-1, keepdim=True)
        enough = mass >= k
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    anchor = order.gather(-1, high)
    tail = torch.where(position >= high, torch.exp2(((order - anchor) * scale).clamp_max_(0.0)), 0.0)
    mass = tail.double().sum(-1, keepdim=True)
    rest = (k - high).clamp_min(torch.finfo(torch.float64).tiny)
    return anchor, (eps * torch.log(mass / rest)).to(x.dtype)


class _Problem(NamedTuple):
    """Rows to solve, with finite thresholds: 0 < budget < count. All but x are [rows, 1]; all but x and scale are
    float64."""

    x: Tensor  # [rows, n], compute dtype
    k: Tensor  # what lam is to sum to over all entries, +inf scores among them
    budget: Tensor  # over finite entries
    eps: Tensor
    scale: Tensor  # log2(e)/eps, compute dtype
    lower: Tensor  # bracket of tau
    upper: Tensor


class _State(NamedTuple):
    """Where rows have got to: tau = hi + lo + offset/scale."""

    hi: Tensor
    lo: Tensor
    offset: Tensor
    done: Tensor


def _floor(budget: Tensor, unit: float) -> Tensor:
    """The residual that does not matter, however small U is."""
    return budget.clamp(max=1.0).mul_(_FLOOR * _TOLERANCE * unit)


def _update(
    saturated: Tensor, mass: Tensor, k: Tensor, budget: Tensor, floor: Tensor, offset: Tensor, done: Tensor, left:
    Tensor,
    right: Tensor, guarded: bool, unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A Newton step on log F for rows that are not done: the new (offset, done, left, right), all in units of
    eps/log2(e).

    The bracket [left, right] is fixed, and only clamps, unless ``guarded``: then it shrinks, and a step that leaves
    it is replaced by
    a bisection.
    """
    residual = (saturated - k).add_(mass)
    size, steerable = residual.abs(), mass * (_TOLERANCE * unit)
    reached = size <= torch.maximum(floor, steerable)
    step = torch.log1p(residual / budget).mul_((residual + budget).div_(mass)).mul_(_LOG2E)
    # the last step of a row that is done polishes it, unless U is too little to steer by
    step = step.masked_fill_(done | (reached & (size >= steerable)), 0.0)
    if guarded:
        above = residual > 0
        left, right = torch.where(above, offset, left), torch.where(above, right, offset)
        candidate = offset + step
        inside = (candidate >= left) & (candidate <= right)
        offset = torch.where(done | inside | reached, candidate, 0.5 * left + 0.5 * right)
    else:
        offset = (offset + step).clamp_(left, right)
    return offset, done | reached, left, right


def _newton(problem: _Problem, state: _State, space: _Workspace, guarded: bool, sweeps: int) -> tuple[_State, _EagerSums]:
    """At most ``sweeps`` steps; ends when every row is done."""
    hi, lo, offset, done = state
    sums = _EagerSums(problem.x, problem.scale, space)
    unit = torch.finfo(problem.x.dtype).eps
    floor = _floor(problem.budget, unit)
    scale = problem.scale.double()
    base = hi.double() + lo
    left, right = (problem.lower - base) * scale, (problem.upper - base) * scale
    sums.anchor(hi, lo)
    for sweep in range(sweeps):
        saturated, negated = sums.sums(offset)
        offset, done, left, right = _update(
            saturated, negated.neg_(), problem.k, problem.budget, floor, offset, done, left, right, guarded, unit,
        )  # fmt: skip
        if bool(done.all()):
            break
        far = offset.abs() > _REACH
        if bool(far.any()) and sweep + 1 < sweeps:
            far = far & ~done
            new_hi, new_lo = _moved(hi, lo, offset / scale)
            shift = (((new_hi.double() - hi) + (new_lo.double() - lo)) * scale).masked_fill_(~far, 0.0)
            hi, lo = torch.where(far, new_hi, hi), torch.where(far, new_lo, lo)
            offset = offset.masked_fill(far, 0.0)
            left, right = left - shift, right - shift
            sums.anchor(hi, lo)
    return _State(hi, lo, offset, done), sums


def _newton_fused(problem: _Problem, state: _State) -> tuple[_State, Tensor]:
    """The same, unguarded, and lam: a few sweeps a compiled call; hi + lo is the threshold itself, the offset stays
    0."""
    hi, lo, offset, done = state
    constants = (problem.lower, problem.upper, problem.k, problem.budget)
    lam = problem.x
    for _ in range(_FREE_SWEEPS // _FUSED_SWEEPS):
        hi, lo, done, lam = _inductor(_fused_newton, problem.x)(problem.x, problem.scale, hi, lo, done, *constants)
        if bool(done.all()):
            break
    return _State(hi, lo, offset, done), lam


def _threshold_and_values(
    x: Tensor, k: Tensor, eps: Tensor, config: LaunchConfig, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves a block. Returns (hi, lo), [rows, 1] each, and writes lam into ``out``.

    Args:
        x: [rows, n] in the compute dtype, -inf where masked, n > 0.
        k, eps: float64 [rows, 1].
    """
    rows, n = x.shape
    dtype = x.dtype
    top, bottom = x.amax(-1, keepdim=True).double(), x.amin(-1, keepdim=True).double()
    settled = spoiled = nothing = None
    budget, count = k, torch.full_like(k, float(n))
    # one check finds infinities and NaN among the scores, k and eps, and budgets that need no solving
    harmless = (top - bottom) * 0.0 + torch.minimum(torch.minimum(k, n - k), torch.minimum(eps, 1.0 / eps))
    if not bool((harmless > 0).all()):
        finite = x.isfinite()
        valid_eps = (eps > 0) & (eps < _INF)
        eps = torch.where(valid_eps, eps, 1.0)
        spoiled = k.isnan() | x.isnan().any(-1, keepdim=True) | ~valid_eps
        infinite = (x == _INF).sum(-1, keepdim=True).double()
        count = finite.sum(-1, keepdim=True).double()
        budget = k - infinite
        nothing = budget <= 0
        settled = spoiled | nothing | (budget >= count)
        # rows that need no solving go along with harmless numbers
        budget, count = torch.where(settled, 0.5, budget), torch.where(settled, 1.0, count)
        top = torch.where(finite & ~settled, x, -_INF).amax(-1, keepdim=True).double().clamp_min(-torch.finfo(dtype).max)
        bottom = torch.where(finite & ~settled, x, _INF).amin(-1, keepdim=True).double().clamp_max(torch.finfo(dtype).max)
        mean, deviation = _moments_of_finite(x, finite & ~settled, count)
    else:
        mean, deviation = _moments(x, space("work", rows).view, count)
    scale = _scale(eps, dtype)
    # a row's bracket: with tau below `lower` every entry is at least k/n, above `upper` every entry is at most k/n
    spread = eps * torch.log(count / budget)
    slack = 1e-15 * torch.maximum(top.abs(), bottom.abs()) + 1e-12 * eps
    lower, upper = bottom + spread - slack, top + spread + slack
    # for k <= 1 the largest entry alone must not exceed k
    largest = top - eps * torch.log(budget) - slack
    lower = torch.maximum(lower, torch.where(budget <= 1, largest, lower))
    # a normal distribution's quantile, and eps more because of what lies below tau
    start = mean + deviation * _aligned(torch.special.ndtri, 1.0 - budget / count) + eps
    start = torch.clamp(start.nan_to_num_(), lower, upper)
    zero = x.new_zeros((rows, 1))
    hi, lo = _moved(zero, zero, start)
    done = torch.zeros_like(k, dtype=torch.bool) if settled is None else settled
    problem = _Problem(x, k if settled is None else torch.where(settled, 0.5, k), budget, eps, scale, lower, upper)
    state = _State(hi, lo, torch.zeros_like(k), done)
    if config.variant == "eager":
        state, sums = _newton(problem, state, space, False, _FREE_SWEEPS)
        sums.values(state.offset, out)
    else:
        state, lam = _newton_fused(problem, state)
        out.copy_(lam)
    hi, lo = state.hi, (state.lo + state.offset / scale).to(dtype)
    if not bool(state.done.all()):
        left = (~state.done).squeeze(-1).nonzero().squeeze(-1)
        hi[left], lo[left], lam = _hard_rows(problem, state, left, space)
        out[left] = lam.to(out.dtype)
    if settled is not None and spoiled is not None and nothing is not None and bool(settled.any()):
        where = settled.squeeze(-1).nonzero().squeeze(-1)
        y, bad, none, budget = x[where], spoiled[where], nothing[where], k[where]
        hi[where] = torch.where(bad, math.nan, torch.where(none, _INF, -_INF)).to(dtype)
        lo[where] = 0.0
        value = torch.where(none, (y == _INF) & (budget > 0), y > -_INF).to(out.dtype)
        out[where] = torch.where(bad, math.nan, value)
    return hi, lo


def _hard_rows(problem: _Problem, state: _State, left: Tensor, space: _Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """(hi, lo, lam) of the few rows ``left``: by guarded steps, and by sorting what is left of them."""
    part = _Problem(*(value[left] for value in problem))
    start = _State(*(value[left] for value in state))
    start = _State(*_moved(start.hi, start.lo, start.offset / part.scale), torch.zeros_like(start.offset), start.done)
    if part.x.shape[-1] <= _SHORT:
        hi, lo = _solve_by_sorting(part.x, part.k, part.eps, part.scale)
        lam = torch.sub(part.x, hi).sub_(lo).mul_(part.scale)
        return hi, lo, _exp2(lam, space).clamp_max_(1.0)
    end, _ = _newton(part, start, space, True, _GUARDED_SWEEPS)
    hi, lo = end.hi, (end.lo + end.offset / part.scale).to(part.x.dtype)
    if not bool(end.done.all()):
        rest = (~end.done).squeeze(-1).nonzero().squeeze(-1)
        hi[rest], lo[rest] = _solve_by_sorting(part.x[rest], part.k[rest], part.eps[rest], part.scale[rest])
    lam = torch.sub(part.x, hi).sub_(lo).mul_(part.scale)
    return hi, lo, _exp2(lam, space).clamp_max_(1.0)


def _exp2(x: Tensor, space: _Workspace) -> Tensor:
    """exp2 of a block, in memory that is padded (see the module's docstring)."""
    work = space("work", x.shape[0])
    work.view.copy_(x)
    work.flat.exp2_()
    return work.view


@torch.no_grad()
def soft_topk_forward(
    scores: Tensor, k: float | Tensor, eps: float | Tensor, mask: Tensor | None, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """``lam = min(1, exp((scores - tau)/eps))`` with tau such that each row of lam sums to k.

    Args:
        scores: [R, n], float16, bfloat16, float32 (computed in float32) or float64, any row stride.
        k: a number or a tensor [R]; +inf scores use up budget first. NaN gives a NaN row.
        eps: a number or a tensor [R]; a value that is not finite or not positive gives a NaN row.
        mask: bool [R, n], True where valid, or None.
        config: rows a block, "eager" or "inductor", threads.

    Returns:
        lam [R, n] in the scores' dtype and the threshold [R, 2] in the compute dtype: tau = hi + lo, an unevaluated
        sum.
        hi is -inf where every valid entry is saturated, +inf where every finite entry is 0, NaN for a NaN row.

    Raises:
        ValueError: the configuration's variant is unknown.
        torch._dynamo.exc.BackendCompilerFailed: variant "inductor" and there is no working C++ compiler.
    """
    _check(config)
    rows, n = scores.shape
    compute = _compute_dtype(scores.dtype)
    lam = torch.empty((rows, n), dtype=scores.dtype, device=scores.device)
    threshold = torch.full((rows, 2), -_INF, dtype=compute, device=scores.device)
    threshold[:, 1] = 0.0
    if rows == 0 or n == 0:
        return lam, threshold
    with _threads(config.num_threads):
        space = _Workspace(min(rows, max(1, config.rows_per_program)), n, threshold)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            hi, lo = _threshold_and_values(x, _column(k, block, scores), _column(eps, block, scores), config, space, lam[block])
            threshold[block, :1], threshold[block, 1:] = hi, lo
    return lam, threshold


@torch.no_grad()
def soft_topk_backward(
    grad: Tensor, scores: Tensor, threshold: Tensor, eps: float | Tensor, mask: Tensor | None, config: LaunchConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The implicit gradient: ``ds = lam (g - gbar)/eps`` on U, ``dk = gbar``, ``deps = -sum((s - tau) ds)/eps``.

    U holds the unsaturated entries (s < tau), and gbar is the mean of g over U weighted by lam; it is 0 where U
    carries no mass.

    Args:
        grad: [R, n], any strides; what it holds outside U has no influence.
        scores, threshold, eps, mask: as given to, and returned by, :func:`soft_topk_forward`.

    Returns:
        dscores [R, n] in the scores' dtype, dk [R] and deps [R] in the compute dtype; NaN for a NaN row.
    """
    _check(config)
    rows, n = scores.shape
    compute = _compute_dtype(scores.dtype)
    dscores = torch.empty((rows, n), dtype=scores.dtype, device=scores.device)
    dk = torch.zeros(rows, dtype=compute, device=scores.device)
    deps = torch.zeros_like(dk)
    if rows == 0 or n == 0:
        dk[threshold[:, 0].isnan()] = math.nan
        deps[threshold[:, 0].isnan()] = math.nan
        return dscores, dk, deps
    with _threads(config.num_threads):
        space = _Workspace(min(rows, max(1, config.rows_per_program)), n, threshold)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            g = grad[block].to(compute)
            hi, lo = threshold[block, :1], threshold[block, 1:]
            temperature = _column(eps, block, scores)
            # rows with nothing to solve go along with a harmless threshold
            still = ~hi.isfinite()
            some_still = bool(still.any())
            if some_still:
                hi = torch.where(still, 0.0, hi)
            scale = _scale(temperature, compute)
            backward = _soft_backward_eager if config.variant == "eager" else _soft_backward_fused
            mean, moment = backward(g, x, hi, lo, scale, temperature, space, dscores[block])
            dk[block] = mean.squeeze(-1).to(compute)
            deps[block] = (moment / -temperature).squeeze(-1).to(compute)
            if some_still:
                where = still.squeeze(-1).nonzero().squeeze(-1) + block.start
                value = torch.where(threshold[where, 0].isnan(), math.nan, 0.0).to(compute)
                dscores[where] = value.unsqueeze(-1).to(dscores.dtype).expand(-1, n)
                dk[where], deps[where] = value, value
    return dscores, dk, deps


def _mean(weighted: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, weighted / mass, 0.0)


def _soft_backward_eager(
    g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, eps: Tensor, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes ds of a block into ``out``; returns (gbar, sum of (s - tau) ds), float64 [rows, 1]."""
    rows = x.shape[0]
    distance, lam, work = space("distance", rows).view, space("lam", rows), space("work", rows).view
    torch.sub(hi, x, out=distance)
    distance.add_(lo)
    # tau - s where that is positive; elsewhere (saturated entries, and inf - inf) so far that lam underflows to 0
    far = torch.finfo(x.dtype).max
    torch.threshold_(distance, 0.0, far)
    torch.mul(distance, -scale, out=lam.view)
    lam.flat.exp2_()
    mass = _row_sum(lam.view).double()
    torch.mul(lam.view, g, out=work)
    weighted = _row_sum(work).double()
    if not bool(weighted.isfinite().all()):
        g = torch.where(lam.view > 0, g, 0.0)
        weighted = _row_sum(torch.mul(lam.view, g, out=work)).double()
    mean = _mean(weighted, mass)
    ds = out if out.dtype == x.dtype else work
    torch.sub(g, mean.to(x.dtype), out=ds)
    ds.mul_(lam.view)
    ds.mul_((1.0 / eps).to(x.dtype))
    torch.mul(ds, distance, out=distance)
    moment = _row_sum(distance).double()
    if not bool(moment.isfinite().all()):
        moment = _row_sum(torch.where(ds == 0, 0.0, distance)).double()
    if ds is not out:
        out.copy_(ds)
    return mean, -moment


def _soft_backward_fused(
    g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, eps: Tensor, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    ds, mean, moment = _inductor(_fused_gradient, x)(g, x, hi, lo, scale, (1.0 / eps).to(x.dtype))
    out.copy_(ds)
    return mean.double(), moment.double()


# --- coordinate_descent ----------------------------------------------------------------------------------------------


def _schedule(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> list[float]:
    """eps_0 … eps_T, in float64."""
    current = max(eps_init, eps)
    values = [current]
    for _ in range(n_iters):
        current = max(current * eps_decay, eps)
        values.append(current)
    return values


def _segment_bounds(n_iters: int, segments: int) -> list[int]:
    """Where segments begin, and n_iters at the end: as even as possible, the longer ones first."""
    length, longer = divmod(n_iters, segments)
    bounds = [0]
    for index in range(segments):
        bounds.append(bounds[-1] + length + (index < longer))
    return bounds


class _Descent:
    """The iteration of one block: everything that does not change from one iteration to the next.

    The state is kept as the barrier -a, at which scores are clamped: [rows, 1] in the compute dtype.
    """

    def __init__(self, x: Tensor, k: Tensor, clamp_k: bool, schedule: list[float], config: LaunchConfig, space: _Workspace) -> None:
        self.x, self.schedule = x, schedule
        self.fused = config.variant == "inductor"
        rows, n, dtype = *x.shape, x.dtype
        self.work, self.kept, self.space = space("work", rows), space("kept", rows), space
        self.scales = [_finite_scale(eps, dtype) for eps in schedule]
        if self.fused:
            # as tensors, since Inductor would compile anew for each number
            self.numbers = [
                (x.new_full((1, 1), eps, dtype=torch.float64), x.new_full((1, 1), scale))
                for eps, scale in zip(schedule, self.scales, strict=True)
            ]
        self.top = x.amax(-1, keepdim=True)
        lowest = x.amin(-1, keepdim=True)
        if bool((lowest > -_INF).all()):
            self.count = torch.full_like(k, float(n))
        else:
            self.count = (x > -_INF).sum(-1, keepdim=True).double()
            lowest = torch.where(x > -_INF, x, _INF).amin(-1, keepdim=True)
        self.spoiled = self.top.isnan() | k.isnan()
        self.beyond = (k > self.count) if clamp_k else torch.zeros_like(self.spoiled)
        if clamp_k:
            k = torch.minimum(k.clamp_min(0.0), self.count)
        self.k = k
        self.empty = ((k == 0) | (self.count == 0)) & ~self.spoiled
        self.special = self.spoiled | self.empty
        self.any_special = bool(self.special.any())
        self.clamped = k.clamp_min(1e-20)
        self.logk = torch.log(self.clamped)
        if self.any_special:
            self.top, lowest = (torch.where(self.special, 0.0, value) for value in (self.top, lowest))
            self.logk = torch.where(self.special, 0.0, self.logk)
            self.count = torch.where(self.special, 1.0, self.count)
        reach = torch.maximum(self.top.abs(), lowest.abs())
        # rows so large that their scaled scores overflow, or that a grid of a few eps is finer than their ulp
        self.large = reach > _LARGE / self.scales[-1]
        self.any_large = bool(self.large.any())
        self.coarse = reach * (64.0 * torch.finfo(dtype).eps) > schedule[-1]
        self.any_coarse = bool(self.coarse.any())
        self.anchor: Tensor | None = None

    def first(self) -> Tensor:
        """-a_1: the scores have no part in it yet."""
        return ((torch.log(self.count) - self.logk) * self.schedule[0]).to(self.x.dtype)

    def next(self, t: int, barrier: Tensor) -> Tensor:
        """-a_{t+1} from -a_t, for t >= 1."""
        if self.fused:
            return _inductor(_fused_next, self.x)(self.x, self.top, self.logk, barrier, *self.numbers[t])
        shift = torch.minimum(self.top, barrier)
        if self.schedule[t] == self.schedule[-1] == self.schedule[t - 1]:
            result = self._next_at_floor(t, shift)
            return torch.where(self.coarse, self._next_direct(t, shift), result) if self.any_coarse else result
        return self._next_direct(t, shift)

    def _next_direct(self, t: int, shift: Tensor) -> Tensor:
        """Subtracts before it scales: a fused multiply-add would save a pass, and move the barrier by half an ulp."""
        work = self.work.view
        torch.sub(self.x, shift, out=work)
        work.clamp_max_(0.0).mul_(self.scales[t])
        self.work.flat.exp2_()
        result = _row_sum(work).double().log_().sub_(self.logk).mul_(self.schedule[t])
        return result.add_(shift).to(self.x.dtype)

    def _next_at_floor(self, t: int, shift: Tensor) -> Tensor:
        """Without an exponential while eps stays: min(E, w) with E = exp((s - anchor)/eps), w = exp((shift -
        anchor)/eps).

        The anchor is the point of a fixed grid that is next to the shift: it follows from a_t alone, and so the bits
        of a_{t+1} do not depend on where an iteration was begun.
        """
        kept, scale, pitch = self.kept.view, self.scales[t], 8.0 * self.schedule[t]
        anchor = torch.round(shift / pitch).mul_(pitch)
        if self.anchor is None or not torch.equal(anchor, self.anchor):
            torch.sub(self.x, anchor, out=kept)
            kept.mul_(scale)
            self.kept.flat.exp2_()
            self.anchor = anchor
        torch.minimum(kept, _aligned(torch.exp2, (shift - anchor).mul_(scale)), out=self.work.view)
        return _row_sum(self.work.view).double().log_().sub_(self.logk).mul_(self.schedule[t]).add_(anchor).to(self.x.dtype)

    def run(self, start: int, stop: int, barrier: Tensor | None) -> Iterator[Tensor]:
        """-a_{start+1} … -a_stop."""
        for t in range(start, stop):
            barrier = self.first() if barrier is None else self.next(t, barrier)
            yield barrier


_LARGE = 1e30
"""Exponents up to this size are computed as one fused multiply-add."""

_TOGETHER = 8
"""Iterations whose scalars the backward of coordinate descent computes together, at least."""

_FAR = 1e35
"""Farther than any such exponent: 2 to minus that is 0."""


def _finite_scale(eps: float, dtype: torch.dtype) -> float:
    """log2(e)/eps as a number of the compute dtype."""
    limit = torch.finfo(dtype).max
    return float(torch.tensor(min(_LOG2E / eps, limit), dtype=dtype))


@torch.no_grad()
def coordinate_descent_forward(
    scores: Tensor,
    k: float | Tensor,
    mask: Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    clamp_k: bool,
    segments: int,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:
    """T iterations of coordinate descent as published, with one scalar of state a row.

    Args:
        scores: [R, n], float16, bfloat16, float32 (computed in float32) or float64, any row stride.
        k: a number or a tensor [R]; its logarithm is taken of at least 1e-20. NaN gives a NaN row.
        mask: bool [R, n], True where valid, or None; -inf scores count as masked.
        n_iters, eps, eps_init, eps_decay: iterations and the schedule of temperatures.
        clamp_k: whether k is clamped to [0, number of valid entries].
        segments: how many states to return, 1..n_iters.
        config: rows a block, "eager" or "inductor", threads.

    Returns:
        lam [R, n] in the scores' dtype and states [R, segments] in the compute dtype, the scalar a at the end of
        each segment:
        -inf where k is 0 or nothing is valid (lam is 0 there), NaN for a NaN row.

    Raises:
        ValueError: the configuration's variant is unknown.
        torch._dynamo.exc.BackendCompilerFailed: variant "inductor" and there is no working C++ compiler.
    """
    _check(config)
    rows, n = scores.shape
    compute = _compute_dtype(scores.dtype)
    lam = torch.empty((rows, n), dtype=scores.dtype, device=scores.device)
    states = torch.full((rows, segments), -_INF, dtype=compute, device=scores.device)
    if rows == 0 or n == 0:
        return lam, states
    schedule = _schedule(n_iters, eps, eps_init, eps_decay)
    ends = {end: index for index, end in enumerate(_segment_bounds(n_iters, segments)[1:])}
    with _threads(config.num_threads):
        space = _Workspace(min(rows, max(1, config.rows_per_program)), n, states)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            descent = _Descent(x, _column(k, block, scores), clamp_k, schedule, config, space)
            barrier = torch.empty(0)
            for t, barrier in enumerate(descent.run(0, n_iters, None), start=1):
                if t in ends:
                    torch.neg(barrier, out=states[block, ends[t] : ends[t] + 1])
            if descent.fused:
                narrow = descent.numbers[-1][1]
                lam[block] = _inductor(_fused_values, x)(x, barrier, torch.zeros_like(barrier), narrow)
            else:
                work = descent.work
                torch.sub(x, barrier, out=work.view)
                work.view.clamp_max_(0.0).mul_(descent.scales[-1])
                work.flat.exp2_()
                lam[block] = work.view
            if descent.any_special:
                for which, value, state in ((descent.empty, 0.0, -_INF), (descent.spoiled, math.nan, math.nan)):
                    where = which.squeeze(-1).nonzero().squeeze(-1) + block.start
                    lam[where], states[where] = value, state
    return lam, states


@torch.no_grad()
def coordinate_descent_backward(
    grad: Tensor,
    scores: Tensor,
    states: Tensor,
    k: float | Tensor,
    mask: Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    clamp_k: bool,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:
    """The gradient of :func:`coordinate_descent_forward`, iteration by iteration backwards.

    With U_t the entries with ``s + a_t <= 0`` and C_t the others, A_{t+1} the gradient of a_{t+1} and
    ``p_t = exp((min(s, -a_t) + a_{t+1})/eps_t)/k``: ``ds -= A_{t+1} p_t`` on U_t and ``A_t = A_{t+1} sum_{C_t}
    p_t``, where that sum is a
    count times one number. The a_t inside a segment are computed again by the very code of the forward, so that the
    gradient does not depend on the number of segments. It ends early when every A_t is 0: nothing was clamped before.

    Args:
        grad: [R, n], any strides; what it holds at saturated or masked entries has no influence.
        states: [R, segments], from the forward; the other arguments as given to it.

    Returns:
        dscores [R, n] in the scores' dtype, dk [R] in the compute dtype; NaN for a NaN row.
    """
    _check(config)
    rows, n = scores.shape
    compute = _compute_dtype(scores.dtype)
    dscores = torch.empty((rows, n), dtype=scores.dtype, device=scores.device)
    dk = torch.zeros(rows, dtype=compute, device=scores.device)
    if rows == 0 or n == 0:
        return dscores, dk
    schedule = _schedule(n_iters, eps, eps_init, eps_decay)
    with _threads(config.num_threads):
        space = _Workspace(min(rows, max(1, config.rows_per_program)), n, states)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            descent = _Descent(x, _column(k, block, scores), clamp_k, schedule, config, space)
            saved = states[block]
            if descent.any_special:
                saved = torch.where(descent.special, 0.0, saved)
            ds, dlogk = _descend_backward(descent, grad[block].to(compute), saved, n_iters)
            dk[block] = torch.where((descent.k >= 1e-20) & ~descent.beyond, dlogk / descent.clamped, 0.0).squeeze(-1).to(compute)
            dscores[block] = ds
            if descent.any_special:
                for which, value in ((descent.empty, 0.0), (descent.spoiled, math.nan)):
                    where = which.squeeze(-1).nonzero().squeeze(-1) + block.start
                    dscores[where], dk[where] = value, value
    return dscores, dk


def _descend_backward(descent: _Descent, g: Tensor, saved: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    """(ds [rows, n], dL/dlog k float64 [rows, 1]) of a block; ``saved`` holds a_t at the end of each segment, [rows,
    segments]."""
    x, schedule, scales, dtype = descent.x, descent.schedule, descent.scales, descent.x.dtype
    rows, segments = saved.shape
    ds, work, count = descent.space("ds", rows), descent.work, descent.space("count", rows).view
    barriers = saved.neg()
    # threshold keeps what is strictly above: 0 itself is unsaturated and stays
    torch.sub(barriers[:, -1:], x, out=ds.view)
    torch.threshold_(ds.view, -torch.finfo(dtype).tiny * torch.finfo(dtype).eps, _INF)
    ds.view.mul_(-scales[-1])
    ds.flat.exp2_()
    torch.mul(ds.view, g, out=work.view)
    if not bool(_row_sum(work.view).isfinite().all()):
        torch.mul(ds.view, torch.where(ds.view > 0, g, 0.0), out=work.view)
    torch.mul(work.view, 1.0 / schedule[-1], out=ds.view)
    chain = _row_sum(ds.view).double()  # A_T
    if descent.any_special:
        chain = torch.where(descent.special, 0.0, chain)
    dlogk = torch.zeros_like(chain)
    bounds = _segment_bounds(n_iters, segments)
    last = segments
    while last > 0:
        # segments by the handful, so that their scalars, [rows, iterations], are computed at once
        segment = last - 1
        while segment > 0 and bounds[last] - bounds[segment] < _TOGETHER:
            segment -= 1
        trace: list[Tensor] = []  # -a_t for t = first … bounds[last]
        for index in range(segment, last):
            entry = barriers[:, index - 1 : index].contiguous() if index else None
            trace.extend(descent.run(bounds[index], bounds[index + 1] - 1, entry))
            trace.append(barriers[:, index : index + 1])
        if segment:
            trace.insert(0, barriers[:, segment - 1 : segment])
        first, stop, last = max(bounds[segment], 1), bounds[last], segment
        if first == stop:
            break
        path = torch.cat(trace, dim=-1)
        before, after = path[:, :-1], path[:, 1:]
        eps = torch.tensor(schedule[first:stop], dtype=torch.float64, device=x.device)
        scale = torch.tensor(scales[first:stop], dtype=dtype, device=x.device)
        shift = torch.minimum(descent.top, before)
        wide = shift.double()
        # exp((shift + a_{t+1})/eps)/k: what an entry at the shift carries
        unit = _aligned(torch.exp2, (wide - after).mul_(_LOG2E).div_(eps)).div_(descent.clamped)
        offset = shift * scale
        share = unit.neg()
        if not descent.any_large:
            # the exponents are those of offset/scale, not of the shift: a rounding apart
            share.mul_(_aligned(torch.exp2, offset.double() - wide * scale))
        columns = [value.split(1, dim=-1) for value in (before, after, share, unit, offset.neg_(), shift)]
        clamping = (before < descent.top).any(0).tolist()
        for t in range(stop - 1, first - 1, -1):
            at = t - first
            barrier, ahead, weight, each, base, shifted = (value[at] for value in columns)
            dlogk.add_(chain, alpha=schedule[t])
            if descent.fused:
                chain = _inductor(_fused_previous, x)(
                    ds.view, x, descent.top, descent.clamped, barrier.contiguous(), ahead.contiguous(), chain,
                    *descent.numbers[t],
                )  # fmt: skip
            else:
                factor = (chain * weight).to(dtype)
                if descent.any_large:
                    torch.sub(x, shifted, out=work.view)
                    work.view.mul_(scales[t])
                else:
                    torch.add(base, x, alpha=scales[t], out=work.view)
                if clamping[at]:
                    torch.gt(x, barrier, out=count)
                    work.view.add_(count, alpha=-_FAR)
                    chain = _row_sum(count) * each * chain
                work.flat.exp2_()
                if descent.any_large:
                    work.view.masked_fill_(x > barrier, 0.0)
                ds.view.addcmul_(work.view, factor)
            if not clamping[at]:
                # nothing was clamped, so nothing before has a part in it
                return ds.view, dlogk
    return ds.view, dlogk.add_(chain, alpha=schedule[0])
