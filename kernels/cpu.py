"""Both operators in plain torch: the backend for CPU tensors (and, slowly, for any device).

The equations are those of the Triton kernels.

``soft_topk``: ``lam_i = min(1, exp((s_i - tau)/eps))`` with the threshold tau such that ``sum(lam) = k``; bracketed Newton on
``log F``, ``F(tau) = sum(lam)``.

``coordinate_descent``: ``a_{t+1} = eps_t (log k - logsumexp(min(s, -a_t)/eps_t))``, one scalar a row, as published in
CoLT5-attention 0.9.0 (arXiv:2303.09752) with the row b eliminated.

How it is made quick without a compiler:

- Work goes in blocks of rows that stay in the cache; every buffer of a block is allocated once a call and reused in place.
- A sweep of ``soft_topk`` does not exponentiate: ``E_i = exp((s_i - anchor)/eps)`` is kept, and while tau stays near the anchor
  a sweep only scales, compares and adds. The anchor is a number of the scores' own precision, so that the differences are
  right wherever the scores lie. Likewise for iterations of ``coordinate_descent`` at one eps.
- ``exp2`` is used instead of ``exp`` (it is far faster in torch), and never where its result would be subnormal.
- Scalars of a row (tau, brackets, logarithms) are float64 of shape ``[rows, 1]``, mostly numpy arrays: there are few of them,
  and each call of torch on so few costs as much as a pass over a whole row.

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import LaunchConfig

VARIANTS = ("eager", "inductor")

Column = NDArray[Any]
"""One number a row, [rows, 1], on the host: numpy's calls on a few numbers take a fraction of the time of torch's."""

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

_MOST = 0.75
"""Share of a block's rows that are done at which the others go on alone."""

_CLOSE = 0.25
"""A relative residual of the unsaturated mass up to which the step that is exact for them is the better one."""

_REACH = 4.0
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


def _block_rows(rows: int, config: LaunchConfig) -> int:
    """Rows of a block: what the configuration gives a core's cache, for each thread that works on it."""
    return min(rows, max(1, config.rows_per_program) * torch.get_num_threads())


def _blocks(rows: int, config: LaunchConfig) -> Iterator[slice]:
    step = _block_rows(rows, config)
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


def _flush(exponents: Tensor) -> Tensor:
    """-inf, in place, where exp2 would give less than a normal number: to compute those it takes three times as long."""
    return torch.threshold_(exponents, math.log2(torch.finfo(exponents.dtype).tiny), -_INF)


def _clamped_to(out: Tensor, weights: Tensor) -> None:
    """min(weights, 1) to ``out``, of any dtype; changes ``weights`` or not."""
    if out.dtype == weights.dtype:
        torch.clamp_max(weights, 1.0, out=out)
    else:
        out.copy_(weights.clamp_max_(1.0))


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


def _row_norm(x: Tensor) -> Tensor:
    """Euclidean norms of contiguous rows, [R, n] -> [R, 1], likewise."""
    n = x.shape[-1]
    if n <= _SUM_CHUNK:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    head = x[:, : n // _SUM_CHUNK * _SUM_CHUNK].unflatten(-1, (-1, _SUM_CHUNK))
    tail = x[:, head.shape[1] * _SUM_CHUNK :]
    parts = torch.linalg.vector_norm(head, dim=-1), torch.linalg.vector_norm(tail, dim=-1, keepdim=True)
    return _row_norm(torch.cat(parts, dim=-1))


def _column(value: float | Tensor, rows: slice, like: Tensor) -> Tensor:
    """A number or a tensor [R] as float64 [rows, 1]."""
    if isinstance(value, Tensor):
        return value[rows].to(torch.float64).unsqueeze(-1)
    return torch.full((rows.stop - rows.start, 1), float(value), dtype=torch.float64, device=like.device)


def _host(x: Tensor) -> Column:
    return x.cpu().numpy()


def _device(column: Column, like: Tensor) -> Tensor:
    """In the dtype of ``like``, unless it is not of floating point."""
    tensor = torch.from_numpy(column)
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


def _host_column(value: float | Tensor, rows: slice) -> Column:
    """A number or a tensor [R] as float64 [rows, 1]."""
    if isinstance(value, Tensor):
        return _host(value[rows].to(torch.float64).unsqueeze(-1))
    return np.full((rows.stop - rows.start, 1), float(value))


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
    """A few sweeps, each with the step that follows from it: (hi, lo, done, lam).

    Sums are taken in float64, here and below: a lane of a vector adds a whole row one after the other, and equal scores then
    round in the same direction every time.
    """
    wide = scale.double()
    unit = torch.finfo(x.dtype).eps
    for _ in range(_FUSED_SWEEPS):
        d = (x - hi) - lo
        saturated = d >= 0
        count = saturated.to(x.dtype).sum(-1, keepdim=True)
        mass = torch.where(saturated, 0.0, torch.exp2(d * scale)).sum(-1, keepdim=True, dtype=torch.float64)
        tau = hi.double() + lo.double()
        left, right = (lower - tau) * wide, (upper - tau) * wide
        offset, done = _update(count, mass, k, budget, done, left, right, unit)
        hi, lo = _pair_moved(hi, lo, offset / wide)
    return hi, lo, done, torch.exp2(((x - hi) - lo) * scale).clamp_max(1.0)


def _fused_values(x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor) -> Tensor:
    """lam at the threshold hi + lo."""
    return torch.exp2(((x - hi) - lo) * scale).clamp_max(1.0)


def _fused_gradient(g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, gbar, sum of (s - tau) ds)."""
    d = (x - hi) - lo
    inside = (d < 0) & (d > -_INF)
    lam = torch.where(inside, torch.exp2(d * scale), 0.0)
    mass = lam.sum(-1, keepdim=True, dtype=torch.float64)
    weighted = torch.where(lam > 0, lam * g, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    mean = torch.where(mass > 0, weighted / mass, 0.0).to(x.dtype)
    ds = torch.where(inside, lam * (g - mean) * inverse, 0.0)
    return ds, mean, torch.where(inside, ds * d, 0.0).sum(-1, keepdim=True, dtype=torch.float64)


def _fused_next(x: Tensor, top: Tensor, logk: Tensor, barrier: Tensor, eps: Tensor, scale: Tensor) -> Tensor:
    """-a_{t+1} from -a_t."""
    shift = torch.minimum(top, barrier)
    total = torch.exp2((torch.minimum(x, barrier) - shift) * scale).sum(-1, keepdim=True, dtype=torch.float64)
    return ((torch.log(total) - logk) * eps + shift.double()).to(x.dtype)


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
    """The sums of a block of rows near an anchor, without an exponential a sweep.

    Offsets are in units of eps/log2(e): the threshold is ``anchor + offset/scale``.
    """

    def __init__(self, x: Tensor, scale: Tensor, space: _Workspace, name: str = "") -> None:
        rows = x.shape[0]
        self.x, self.scale = x, scale
        self.kept, self.work, self.count = space(name + "kept", rows), space(name + "work", rows), space(name + "count", rows)
        # comparisons with a tensor are quick, those with a number are not
        self.one = x.new_full((1, 1), -1.0)

    def anchor(self, at: Column) -> None:
        """Keeps exp((s - at)/eps); an overflow to inf is a saturated entry."""
        kept = self.kept.view
        torch.sub(self.x, _device(at, self.x), out=kept)
        _flush(kept.mul_(self.scale))
        self.kept.flat.exp2_()

    def sums(self, offset: Column) -> tuple[Column, Column, Column]:
        """(M, U, the largest of U) at the threshold anchor + offset."""
        work, count = self.work.view, self.count.view
        # negated, because torch.threshold keeps what is above its threshold
        torch.mul(self.kept.view, self._factor(offset, -1.0), out=work)
        torch.le(work, self.one, out=count)
        torch.threshold_(work, -1.0, 0.0)
        found = _host(torch.cat((_row_sum(count), _row_sum(work), work.amin(-1, keepdim=True)), dim=-1)).astype(np.float64)
        return found[:, :1], -found[:, 1:2], -found[:, 2:]

    def _factor(self, offset: Column, sign: float) -> Tensor:
        # neither 0 nor inf, or an exponential that is inf or 0 would become NaN
        info = torch.finfo(self.x.dtype)
        return _device(sign * np.exp2(-offset).clip(info.tiny, info.max), self.x)

    def values(self, offset: Column, out: Tensor) -> None:
        """lam at the threshold anchor + offset."""
        work = self.work.view
        torch.mul(self.kept.view, self._factor(offset, 1.0), out=work)
        _clamped_to(out, work)


def _scale(eps: Tensor, dtype: torch.dtype) -> Tensor:
    """log2(e)/eps, finite in the compute dtype."""
    return (_LOG2E / eps).clamp_max(torch.finfo(dtype).max).to(dtype)


def _pair_moved(hi: Tensor, lo: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The unevaluated sum hi + lo + step (float64) as a pair of the compute dtype (a two-sum)."""
    rest = lo.double() + step
    new_hi = (hi.double() + rest).to(hi.dtype)
    new_lo = ((hi.double() - new_hi.double()) + rest).to(hi.dtype)
    return new_hi, new_lo


def _moments(x: Tensor, count: Column, finite: Tensor | None = None) -> tuple[Column, Column]:
    """Mean and variance of rows of ``count`` entries, those that are ``finite``, good enough to start from; float64.

    Infinite or NaN where a score is, or where its square is beyond the range. A row whose entries are all finite gets
    the same bits with ``finite`` as without, so that its result does not depend on its neighbours.
    """
    clean = x if finite is None else torch.where(finite, x, 0.0)
    found = _host(torch.cat((_row_sum(clean), _row_norm(clean)), dim=-1)).astype(np.float64)
    mean = found[:, :1] / count
    square = mean * mean
    variance = found[:, 1:] ** 2 / count - square
    offset = variance <= 1e-3 * square  # too much cancels: subtract the mean first
    if offset.any():
        away = x - _device(mean, x)
        if finite is not None:
            away = torch.where(finite, away, 0.0)
        variance = np.where(offset, _host(_row_norm(away)).astype(np.float64) ** 2 / count, variance)
    return mean, variance


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
    """Rows to solve, with finite thresholds: 0 < budget < count. All but x are [rows, 1], float64."""

    x: Tensor  # [rows, n], compute dtype
    k: Column  # what lam is to sum to over all entries, +inf scores among them
    budget: Column  # over finite entries
    eps: Column
    scale: Column  # log2(e)/eps, rounded to the compute dtype
    lower: Column  # bracket of tau
    upper: Column

    def part(self, rows: Column) -> _Problem:
        return _Problem(self.x[torch.from_numpy(rows).to(self.x.device)], *(value[rows] for value in self[1:]))


class _State(NamedTuple):
    """Where rows have got to: tau = anchor + offset/scale, the anchor a number of the compute dtype."""

    anchor: Column
    offset: Column
    done: Column

    def part(self, rows: Column) -> _State:
        return _State(*(value[rows] for value in self))


def _floor(budget: Any, unit: float) -> Any:
    """The residual that does not matter, however small U is; of a tensor or an array."""
    return budget.clip(max=1.0) * (_FLOOR * _TOLERANCE * unit)


def _update(
    saturated: Tensor,
    mass: Tensor,
    k: Tensor,
    budget: Tensor,
    done: Tensor,
    left: Tensor,
    right: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor]:
    """A Newton step on log F inside [left, right], 0 for rows that are done, and which are done now; in units of
    eps/log2(e)."""
    residual = (saturated - k).add_(mass)
    size, steerable = residual.abs(), mass * (_TOLERANCE * unit)
    reached = size <= torch.maximum(_floor(budget, unit), steerable)
    step = torch.log1p(residual / budget).mul_((residual + budget).div_(mass)).mul_(_LOG2E)
    # the last step of a row that is done polishes it, unless U is too little to steer by
    step = step.masked_fill_(done | (reached & (size >= steerable)), 0.0)
    return step.clamp_(left, right), done | reached


def _advance(sums: tuple[Column, Column, Column], problem: _Problem, floor: Column) -> tuple[Column, Column]:
    """The step from the sums of a sweep, in units of eps/log2(e), and which rows it ends.

    As long as no entry crosses 1 the unsaturated ones are to be multiplied by (k - M)/U, and that is exact. Where some
    do cross, it is an upper bound of tau all the same, from which such steps fall to tau; but farther away Newton's
    step on log F is the better one.
    """
    saturated, mass, largest = sums
    rest = problem.k - saturated
    ratio = rest / mass
    close = np.abs(ratio - 1.0) < _CLOSE
    slack = _TOLERANCE * torch.finfo(problem.x.dtype).eps
    exact = close & (ratio >= 1.0 - slack) & (largest * ratio <= 1.0)
    excess = mass - rest
    total = excess + problem.budget
    step = np.where(close, -np.log2(ratio), np.log2(total / problem.budget) * (total / mass))
    reached = np.abs(excess) <= floor
    # what no step can resolve stays where it is
    return np.where(reached & ~exact, 0.0, step), exact | reached


def _moved(state: _State, dtype: torch.dtype, scale: Column, done: Column) -> tuple[Column, Column]:
    """(anchor, offset) of rows that are to compute their exponentials anew: there where tau is."""
    far = (np.abs(state.offset) > _REACH) & ~done
    tau = np.where(far, state.anchor + state.offset / scale, state.anchor)
    anchor = _rounded(tau, dtype)
    return anchor, np.where(far, (state.anchor - anchor) * scale + state.offset, state.offset)


def _rounded(column: Column, dtype: torch.dtype) -> Column:
    """float64, but numbers of the compute dtype."""
    return column if dtype == torch.float64 else column.astype(np.float32).astype(np.float64)


def _sweep(problem: _Problem, state: _State, sums: _EagerSums, first: int) -> tuple[_State, int]:
    """Sweeps ``first`` and on, each with its step, until every row is done or nearly so many that the others had
    better go on alone. The exponentials at the anchor are there, unless ``first`` is 0. Also the number of the next.
    """
    anchor, offset, done = state
    scale = problem.scale
    floor = _floor(problem.budget, torch.finfo(problem.x.dtype).eps)
    if first == 0:
        sums.anchor(anchor)
    for sweep in range(first, _FREE_SWEEPS):
        step, ends = _advance(sums.sums(offset), problem, floor)
        aim = np.where(done, offset, offset + step)
        offset = np.where(done, offset, aim.clip((problem.lower - anchor) * scale, (problem.upper - anchor) * scale))
        done = done | (ends & (aim == offset))
        if sweep + 1 < _FREE_SWEEPS and bool(((np.abs(offset) > _REACH) & ~done).any()):
            anchor, offset = _moved(_State(anchor, offset, done), problem.x.dtype, scale, done)
            sums.anchor(anchor)
        if done.sum() >= _MOST * done.size:
            return _State(anchor, offset, done), sweep + 1
    return _State(anchor, offset, done), _FREE_SWEEPS


def _newton(problem: _Problem, state: _State, space: _Workspace) -> tuple[_State, _EagerSums]:
    """Free sweeps: those of the whole block, then those of the rows that are left."""
    sums = _EagerSums(problem.x, _device(problem.scale, problem.x), space)
    state, after = _sweep(problem, state, sums, 0)
    if after < _FREE_SWEEPS and not state.done.all():
        left = np.flatnonzero(~state.done)
        where = torch.from_numpy(left).to(problem.x.device)
        part, end = problem.part(left), state.part(left)
        few = _EagerSums(part.x, _device(part.scale, part.x), space, "few ")
        torch.index_select(sums.kept.view, 0, where, out=few.kept.view)
        while after < _FREE_SWEEPS and not end.done.all():
            end, after = _sweep(part, end, few, after)
        sums.kept.view.index_copy_(0, where, few.kept.view)
        for value, solved in zip(state, end, strict=True):
            value[left] = solved
    return state, sums


def _guarded(problem: _Problem, state: _State, space: _Workspace) -> _State:
    """Sweeps inside a bracket that shrinks."""
    x, k, budget, _, scale, lower, upper = problem
    sums = _EagerSums(x, _device(scale, x), space, "few ")
    unit = torch.finfo(x.dtype).eps
    floor = _floor(budget, unit)
    tau = state.anchor + state.offset / scale
    tau = np.where(np.isnan(tau), upper, tau).clip(lower, upper)
    anchor = _rounded(tau, x.dtype)
    offset, done = (tau - anchor) * scale, state.done
    sums.anchor(anchor)
    for sweep in range(_GUARDED_SWEEPS):
        saturated, mass, _ = sums.sums(offset)
        residual = (saturated - k) + mass
        steerable = mass * (_TOLERANCE * unit)
        reached = np.abs(residual) <= np.maximum(floor, steerable)
        step = np.log1p(residual / budget) * ((residual + budget) / mass) * _LOG2E
        # the last step of a row that is done polishes it, unless U is too little to steer by
        step = np.where(reached & (np.abs(residual) >= steerable), 0.0, step)
        above, tau = residual > 0, anchor + offset / scale
        lower, upper = np.where(above & ~done, tau, lower), np.where(above | done, upper, tau)
        left, right = (lower - anchor) * scale, (upper - anchor) * scale
        candidate = offset + step
        inside = (candidate >= left) & (candidate <= right)
        offset = np.where(done, offset, np.where(inside | reached, candidate, 0.5 * left + 0.5 * right))
        done = done | reached
        if done.all():
            break
        if sweep + 1 < _GUARDED_SWEEPS and bool(((np.abs(offset) > _REACH) & ~done).any()):
            anchor, offset = _moved(_State(anchor, offset, done), x.dtype, scale, done)
            sums.anchor(anchor)
    return _State(anchor, offset, done)


def _newton_fused(problem: _Problem, state: _State) -> tuple[_State, Tensor]:
    """The same, unguarded, and lam: a few sweeps a compiled call."""
    x = problem.x
    hi, scale = _device(state.anchor, x), _device(problem.scale, x)
    lo, done = torch.zeros_like(hi), _device(state.done, x)
    double = torch.empty(0, dtype=torch.float64, device=x.device)
    constants = [_device(value, double) for value in (problem.lower, problem.upper, problem.k, problem.budget)]
    lam = x
    for _ in range(_FREE_SWEEPS // _FUSED_SWEEPS):
        hi, lo, done, lam = _inductor(_fused_newton, x)(x, scale, hi, lo, done, *constants)
        if bool(done.all()):
            break
    return _State(_host(hi).astype(np.float64), _host(lo).astype(np.float64) * problem.scale, _host(done)), lam


def _bracket(top: Column, bottom: Column, count: Column, budget: Column, eps: Column) -> tuple[Column, Column]:
    """Bounds of tau from bounds of the scores: below ``lower`` every entry is at least k/n, above ``upper`` at most."""
    spread = eps * np.log(count / budget)
    slack = 1e-15 * np.maximum(np.abs(top), np.abs(bottom)) + 1e-12 * eps
    return bottom + spread - slack, top + spread + slack


def _raised(lower: Column, top: Column, budget: Column, eps: Column) -> Column:
    """``lower``, raised where k <= 1: there the largest entry alone must not exceed k."""
    largest = top - eps * np.log(budget) - 1e-15 * np.abs(top) - 1e-12 * eps
    return np.where(budget <= 1, np.maximum(lower, largest), lower)


def _top(x: Tensor) -> Column:
    """The largest finite score."""
    return _host(torch.where(x.isfinite(), x, -_INF).amax(-1, keepdim=True).double())


def _normal_quantile(share: Column) -> Column:
    return _host(_aligned(torch.special.ndtri, torch.from_numpy(share)))


class _Settled(NamedTuple):
    """Rows that need no solving."""

    which: Column
    spoiled: Column  # NaN rows
    nothing: Column  # no budget is left for finite entries


def _threshold_and_values(
    x: Tensor, k: Column, eps: Column, harmless: bool, config: LaunchConfig, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves a block. Returns (hi, lo), [rows, 1] each, and writes lam into ``out``.

    Args:
        x: [rows, n] in the compute dtype, -inf where masked, n > 0.
        k, eps: float64 [rows, 1].
        harmless: 0 < k < n and eps is positive and finite, for every row.
    """
    rows, n = x.shape
    limit = torch.finfo(x.dtype).max
    given, budget, count = k, k, np.full((rows, 1), float(n))
    settled = None
    mean, variance = _moments(x, count)
    if not (harmless and np.isfinite(variance).all()):
        finite = x.isfinite()
        valid_eps = (eps > 0) & (eps < _INF)
        eps = np.where(valid_eps, eps, 1.0)
        spoiled = np.isnan(k) | _host(x.isnan().any(-1, keepdim=True)) | ~valid_eps
        count = _host(finite.sum(-1, keepdim=True).double())
        budget = k - _host((x == _INF).sum(-1, keepdim=True).double())
        settled = _Settled(spoiled | (budget <= 0) | (budget >= count), spoiled, budget <= 0)
        # they go along with harmless numbers
        k, budget, count = (np.where(settled.which, number, value) for number, value in ((0.5, k), (0.5, budget), (1.0, count)))
        mean, variance = _moments(x, count, finite & ~_device(settled.which, x))
    scale = _rounded((_LOG2E / eps).clip(max=limit), x.dtype)
    # no score is farther from the mean (Samuelson's inequality), but for rounding
    radius = np.where(np.isfinite(variance), 1.01 * np.sqrt(variance * count) + 1e-5 * np.abs(mean), limit)
    lower, upper = _bracket(mean + radius, mean - radius, count, budget, eps)
    if (budget <= 1).any():
        lower = _raised(lower, np.maximum(_top(x), -limit), budget, eps)
    # F is the upper tail of s + eps * Exp(1); a normal distribution's quantile, with the moments of that sum
    start = mean + eps + np.sqrt(variance + eps * eps) * _normal_quantile(1.0 - budget / count)
    tau = np.where(np.isfinite(start), start, mean).clip(lower, upper)
    anchor = _rounded(tau.clip(-limit, limit), x.dtype)
    done = np.zeros((rows, 1), dtype=np.bool_) if settled is None else settled.which
    problem = _Problem(x, k, budget, eps, scale, lower, upper)
    state = _State(anchor, (tau - anchor) * scale, done)
    if config.variant == "eager":
        state, sums = _newton(problem, state, space)
        sums.values(state.offset, out)
    else:
        state, lam = _newton_fused(problem, state)
        out.copy_(lam)
    hi, lo = _device(state.anchor, x), _device(state.offset / scale, x)
    if not state.done.all():
        left = np.flatnonzero(~state.done)
        where = torch.from_numpy(left).to(x.device)
        hi[where], lo[where], lam = _hard_rows(problem.part(left), state.part(left), space)
        out[where] = lam.to(out.dtype)
    if settled is not None and settled.which.any():
        which = np.flatnonzero(settled.which)
        where = torch.from_numpy(which).to(x.device)
        bad, none, some = (_device(value[which], x) for value in (settled.spoiled, settled.nothing, given > 0))
        hi[where] = torch.where(bad, math.nan, torch.where(none, _INF, -_INF)).to(x.dtype)
        lo[where] = 0.0
        y = x[where]
        value = torch.where(none, (y == _INF) & some, y > -_INF).to(out.dtype)
        out[where] = torch.where(bad, math.nan, value)
    return hi, lo


def _hard_rows(problem: _Problem, state: _State, space: _Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """(hi, lo, lam) of the few rows that are left: by guarded steps, and by sorting what is left of them."""
    x, budget, eps = problem.x, problem.budget, problem.eps
    if x.shape[-1] <= _SHORT:
        hi, lo = _sorted(problem)
    else:
        finite, top = x.isfinite(), _top(x)
        bottom = _host(torch.where(finite, x, _INF).amin(-1, keepdim=True).double())
        lower, upper = _bracket(top, bottom, _host(finite.sum(-1, keepdim=True).double()), budget, eps)
        lower = _raised(lower, top, budget, eps)
        end = _guarded(problem._replace(lower=lower, upper=upper), state, space)
        hi, lo = _device(end.anchor, x), _device(end.offset / problem.scale, x)
        if not end.done.all():
            rest = np.flatnonzero(~end.done)
            where = torch.from_numpy(rest).to(x.device)
            hi[where], lo[where] = _sorted(problem.part(rest))
    scale = _device(problem.scale, x)
    lam = torch.sub(x, hi).sub_(lo).mul_(scale)
    return hi, lo, _exp2(lam, space).clamp_max_(1.0)


def _sorted(problem: _Problem) -> tuple[Tensor, Tensor]:
    double = torch.empty(0, dtype=torch.float64, device=problem.x.device)
    k, eps = _device(problem.k, double), _device(problem.eps, double)
    return _solve_by_sorting(problem.x, k, eps, _device(problem.scale, problem.x))


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
    # as numbers they are looked at here and once
    harmless = not isinstance(k, Tensor) and not isinstance(eps, Tensor) and 0 < k < n and 0 < eps < _INF
    with _threads(config.num_threads):
        space = _Workspace(_block_rows(rows, config), n, threshold)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            columns = _host_column(k, block), _host_column(eps, block)
            # divisions by 0 and their like end as comparisons that are false
            with np.errstate(all="ignore"):
                hi, lo = _threshold_and_values(x, *columns, harmless, config, space, lam[block])
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
        dscores [R, n] in the scores' dtype, dk [R] and deps [R] in the compute dtype; NaN for a NaN row. Nothing asks
        for the deps of a number: 0.
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
        space = _Workspace(_block_rows(rows, config), n, threshold)
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
            mean, moment = backward(g, x, hi, lo, scale, temperature, isinstance(eps, Tensor), space, dscores[block])
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
    g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, eps: Tensor, moment: bool, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes ds of a block into ``out``; returns (gbar, sum of (s - tau) ds), float64 [rows, 1]; that sum is 0 unless
    ``moment``."""
    rows = x.shape[0]
    distance, lam, work = space("distance", rows).view, space("lam", rows), space("work", rows).view
    torch.sub(hi, x, out=distance)
    distance.add_(lo)
    # tau - s where that is positive; elsewhere (saturated entries, and inf - inf) so far that lam underflows to 0
    far = torch.finfo(x.dtype).max
    torch.threshold_(distance, 0.0, far)
    _flush(torch.mul(distance, -scale, out=lam.view))
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
    if ds is not out:
        out.copy_(ds)
    if not moment:
        return mean, torch.zeros_like(mean)
    torch.mul(ds, distance, out=distance)
    total = _row_sum(distance).double()
    if not bool(total.isfinite().all()):
        total = _row_sum(torch.where(ds == 0, 0.0, distance)).double()
    return mean, -total


def _soft_backward_fused(
    g: Tensor, x: Tensor, hi: Tensor, lo: Tensor, scale: Tensor, eps: Tensor, moment: bool, space: _Workspace, out: Tensor
) -> tuple[Tensor, Tensor]:
    ds, mean, total = _inductor(_fused_gradient, x)(g, x, hi, lo, scale, (1.0 / eps).to(x.dtype))
    out.copy_(ds)
    return mean.double(), total.double() * moment


# --- coordinate_descent ----------------------------------------------------------------------------------------------


def _schedule(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> list[float]:
    """eps_0 … eps_T, in float64."""
    current = max(eps_init, eps)
    values = [current]
    for _ in range(n_iters):
        current = max(current * eps_decay, eps)
        values.append(current)
    return values


def _steps(schedule: list[float], n_iters: int, most: int) -> Iterator[tuple[int, int]]:
    """Iterations 1 … T-1 as (first, how many): those at constant eps are done together, at most so many at a time."""
    t = 1
    while t < n_iters:
        length = 1
        while length < most and t + length < n_iters and schedule[t + length] == schedule[t]:
            length += 1
        yield t, length
        t += length


def _segment_bounds(n_iters: int, segments: int) -> list[int]:
    """Where segments begin, and n_iters at the end: as even as possible, the longer ones first."""
    length, longer = divmod(n_iters, segments)
    bounds = [0]
    for index in range(segments):
        bounds.append(bounds[-1] + length + (index < longer))
    return bounds


class _Descent:
    """The iteration of one block: everything that does not change from one iteration to the next.

    The state is kept as the barrier -a, at which scores are clamped: [rows, 1], rounded to the compute dtype.
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
        # rows in which a few eps are finer than the scores' ulp
        self.coarse = _host(torch.maximum(self.top.abs(), lowest.abs()) * (64.0 * torch.finfo(dtype).eps) > schedule[-1])
        self.highest, self.logs_of_k = _host(self.top).astype(np.float64), _host(self.logk)
        self.lowest_exponent = math.log2(torch.finfo(dtype).tiny)

    def steps(self, n_iters: int) -> list[tuple[int, int]]:
        return list(_steps(self.schedule, n_iters, 1 if self.fused else _TOGETHER))

    def first(self) -> Column:
        """-a_1: the scores have no part in it yet."""
        return _rounded(_host((torch.log(self.count) - self.logk) * self.schedule[0]), self.x.dtype)

    def next(self, t: int, barrier: Column) -> Column:
        """-a_{t+1} from -a_t, for t >= 1."""
        if self.fused:
            at = _device(barrier, self.x)
            found = _inductor(_fused_next, self.x)(self.x, self.top, self.logk, at, *self.numbers[t])
            return _host(found).astype(np.float64)
        shift = np.minimum(self.highest, barrier)
        work = self.work.view
        torch.sub(self.x, _device(shift, self.x), out=work)
        # what exp2 would make less than a normal number is nothing beside the entry at the shift
        work.mul_(self.scales[t]).clamp_(self.lowest_exponent, 0.0)
        self.work.flat.exp2_()
        logs = np.log(_host(_row_sum(work)).astype(np.float64)) - self.logs_of_k
        return _rounded(shift + logs * self.schedule[t], self.x.dtype)

    def _together(self, t: int, length: int, barrier: Column) -> Column:
        """-a_{t+1} … -a_{t+length}, [rows, length], where eps stays: with a single exponential.

        With E = exp((s - anchor)/eps) and w_t = exp((-a_t - anchor)/eps) the iteration is w_{t+1} = sum(min(E, w_t))/k.
        """
        kept, work = self.kept.view, self.work.view
        anchor = np.minimum(self.highest, barrier)
        torch.sub(self.x, _device(anchor, self.x), out=kept)
        _flush(kept.mul_(self.scales[t]))
        self.kept.flat.exp2_()
        inverse, limit, sums = (1.0 / self.clamped).to(kept.dtype), torch.ones_like(self.top), []
        for _ in range(length):
            torch.minimum(kept, limit, out=work)
            sums.append(_row_sum(work))
            limit = sums[-1] * inverse
        logs = np.log(_host(torch.cat(sums, dim=-1)).astype(np.float64)) - self.logs_of_k
        path = _rounded(anchor + logs * self.schedule[t], self.x.dtype)
        # rows that went so far from the anchor that E is no longer right to the last bits go one by one
        apart = ~(np.abs(logs).max(-1, keepdims=True) <= _APART) | self.coarse
        if apart.any():
            alone = []
            for later in range(t, t + length):
                barrier = self.next(later, barrier)
                alone.append(barrier)
            path = np.where(apart, np.concatenate(alone, axis=-1), path)
        return path

    def weights(self, at: Tensor, t: int) -> Tensor:
        """exp(min(s - at, 0)/eps_t), [rows, n] in scratch memory."""
        work = self.work.view
        torch.sub(self.x, at, out=work)
        _flush(work.mul_(self.scales[t]).clamp_max_(0.0))
        self.work.flat.exp2_()
        return work

    def inverse_of_weights(self, at: Tensor, t: int) -> Tensor:
        """exp((at - s)/eps_t), and inf where s > at, [rows, n] in scratch memory.

        It, and a division, take a pass less than what it is the inverse of.
        """
        work, info = self.work.view, torch.finfo(self.x.dtype)
        torch.sub(at, self.x, out=work)
        # threshold keeps what is strictly above: 0 itself stays
        torch.threshold_(work, -info.tiny * info.eps, _INF)
        work.mul_(self.scales[t])
        self.work.flat.exp2_()
        return work

    def run(self, n_iters: int) -> Tensor:
        """-a_1 … -a_T, [rows, T]."""
        path = [self.first()]
        with np.errstate(all="ignore"):
            for t, length in self.steps(n_iters):
                barrier = path[-1][:, -1:]
                path.append(self.next(t, barrier) if length == 1 else self._together(t, length, barrier))
        return _device(np.concatenate(path, axis=-1), self.x)


_TOGETHER = 16
"""Iterations at constant eps that share an exponential, at most."""

_APART = 6.0
"""How far a_t may go meanwhile, in units of eps."""


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
    ends = [end - 1 for end in _segment_bounds(n_iters, segments)[1:]]
    with _threads(config.num_threads):
        space = _Workspace(_block_rows(rows, config), n, states)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            descent = _Descent(x, _column(k, block, scores), clamp_k, schedule, config, space)
            path = descent.run(n_iters)
            torch.neg(path[:, ends], out=states[block])
            barrier = path[:, -1:]
            if descent.fused:
                narrow = descent.numbers[-1][1]
                lam[block] = _inductor(_fused_values, x)(x, barrier, torch.zeros_like(barrier), narrow)
            else:
                work = descent.work
                torch.sub(x, barrier, out=work.view)
                _flush(work.view.mul_(descent.scales[-1]))
                work.flat.exp2_()
                _clamped_to(lam[block], work.view)
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
    count times one number. Unless every a_t was saved they are all computed again by the very code of the forward, so
    that the gradient does not depend on the number of segments. It ends early when every A_t is 0: nothing was clamped
    before.

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
        space = _Workspace(_block_rows(rows, config), n, states)
        for block in _blocks(rows, config):
            x = _scores(scores, mask, block, compute)
            descent = _Descent(x, _column(k, block, scores), clamp_k, schedule, config, space)
            saved = states[block]
            if descent.any_special:
                saved = torch.where(descent.special, 0.0, saved)
            ds = dscores[block] if scores.dtype == compute else space("ds", x.shape[0]).view
            dlogk = _descend_backward(descent, grad[block].to(compute), saved, n_iters, ds)
            dk[block] = torch.where((descent.k >= 1e-20) & ~descent.beyond, dlogk / descent.clamped, 0.0).squeeze(-1).to(compute)
            if scores.dtype != compute:
                dscores[block] = ds
            if descent.any_special:
                for which, value in ((descent.empty, 0.0), (descent.spoiled, math.nan)):
                    where = which.squeeze(-1).nonzero().squeeze(-1) + block.start
                    dscores[where], dk[where] = value, value
    return dscores, dk


def _descend_backward(descent: _Descent, g: Tensor, saved: Tensor, n_iters: int, ds: Tensor) -> Tensor:
    """Writes ds [rows, n] of a block; returns dL/dlog k, float64 [rows, 1]. ``saved`` holds a_t at the end of each
    segment, [rows, segments]."""
    schedule = descent.schedule
    path = saved.neg() if saved.shape[1] == n_iters else descent.run(n_iters)
    inverse = descent.inverse_of_weights(path[:, -1:], n_iters)
    torch.div(g, inverse, out=ds)
    chain = _row_sum(ds)  # A_T
    if not bool(chain.isfinite().all()):
        torch.div(torch.where(inverse < _INF, g, 0.0), inverse, out=ds)
        chain = _row_sum(ds)
    ds.mul_(1.0 / schedule[-1])
    chain = chain.double().div_(schedule[-1])
    if descent.any_special:
        chain = torch.where(descent.special, 0.0, chain)
    adjoint = _Adjoint(descent, path, ds, chain)
    for t, length in reversed(descent.steps(n_iters)):
        if length == 1:
            adjoint.previous(t)
        else:
            adjoint.together(t, length)
        if not adjoint.clamping[t]:
            # nothing was clamped, so nothing before has a part in it
            break
    return adjoint.of_logk()


class _Adjoint:
    """The gradient of a_t of one block, from t = T backwards; what iterations add to ``ds`` is added in place."""

    def __init__(self, descent: _Descent, path: Tensor, ds: Tensor, chain: Tensor) -> None:
        self.descent, self.ds = descent, ds
        self.chain = [chain]  # A_T, A_{T-1}, …
        n_iters = path.shape[1]
        schedule = descent.schedule[1:n_iters]
        self.eps = torch.tensor(schedule, dtype=torch.float64, device=path.device)
        self.before, self.after = path[:, :-1], path[:, 1:]
        self.shift = torch.minimum(descent.top, self.before)
        # what an entry at the shift carries
        self.unit = self._carried(self.shift)
        self.shifts, self.units = self.shift.split(1, dim=-1), self.unit.split(1, dim=-1)
        self.clamping = [True, *(self.before < descent.top).any(0).tolist()]  # by t

    def _carried(self, at: Tensor, columns: slice = slice(None)) -> Tensor:
        """exp((at + a_{t+1})/eps_t)/k, for the iterations of ``columns``."""
        exponent = (at.double() - self.after[:, columns]).mul_(_LOG2E).div_(self.eps[columns])
        return _aligned(torch.exp2, exponent).div_(self.descent.clamped)

    def previous(self, t: int) -> None:
        """Iteration t, of which ds_i -= A_{t+1} exp((s_i + a_{t+1})/eps_t)/k where s_i is not clamped."""
        descent, chain = self.descent, self.chain[-1]
        shift, unit = self.shifts[t - 1], self.units[t - 1]
        if descent.fused:
            before, after = self.before[:, t - 1 : t].contiguous(), self.after[:, t - 1 : t].contiguous()
            numbers = descent.top, descent.clamped, before, after, chain, *descent.numbers[t]
            self.chain.append(_inductor(_fused_previous, descent.x)(self.ds, descent.x, *numbers))
            return
        factor = (chain * unit).neg_().to(self.ds.dtype)
        self.ds.addcdiv_(factor, descent.inverse_of_weights(shift, t))
        if self.clamping[t]:
            count = descent.space("count", self.ds.shape[0]).view
            torch.gt(descent.x, shift, out=count)
            self.chain.append(_row_sum(count) * unit * chain)
        else:
            self.chain.append(torch.zeros_like(chain))

    def together(self, t: int, length: int) -> None:
        """Iterations t … t+length-1, at one eps: an exponential times a weight that is constant between barriers."""
        descent, rows, columns = self.descent, self.ds.shape[0], slice(t - 1, t - 1 + length)
        shifts = self.shift[:, columns]
        highest = shifts.amax(-1, keepdim=True)
        apart = (highest - shifts.amin(-1, keepdim=True)) > _APART * descent.schedule[t]
        carried = self._carried(highest, columns)
        any_apart = bool(apart.any())
        if any_apart:
            carried.masked_fill_(apart, 0.0)
        weight, below = descent.space("weight", rows).view, descent.space("count", rows).view
        begin = len(self.chain)
        parts = carried.split(1, dim=-1)
        for each in reversed(range(length)):
            chain = self.chain[-1]
            torch.le(descent.x, self.shifts[t - 1 + each], out=below)
            factor = (chain * parts[each]).neg_().to(weight.dtype)
            if each == length - 1:
                torch.mul(below, factor, out=weight)
            else:
                weight.addcmul_(below, factor)
            self.chain.append((descent.x.shape[-1] - _row_sum(below)) * self.units[t - 1 + each] * chain)
        self.ds.addcmul_(weight, descent.weights(highest, t))
        if any_apart:
            # a factor of 0 leaves the other rows as they are
            for each in reversed(range(length)):
                chain = self.chain[begin - 1 + length - 1 - each]
                factor = torch.where(apart, chain * self.units[t - 1 + each], 0.0).neg_().to(weight.dtype)
                self.ds.addcdiv_(factor, descent.inverse_of_weights(self.shifts[t - 1 + each], t))

    def of_logk(self) -> Tensor:
        """dL/dlog k: the sum of A_{t+1} eps_t."""
        chain = torch.cat(self.chain, dim=-1)
        n_iters = self.shift.shape[1] + 1
        eps = torch.tensor(self.descent.schedule[:n_iters], dtype=torch.float64, device=chain.device).flip(0)
        return (chain * eps[: chain.shape[1]]).sum(-1, keepdim=True)
