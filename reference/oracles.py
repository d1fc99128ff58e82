"""The truth: float64 oracles of both operators, with their gradients, and the plain torch versions.

The numpy oracles share no code with the kernels they judge, nor with each other:

- :func:`coordinate_descent_numpy` is the published recurrence with b as a vector (CoLT5, https://arxiv.org/abs/2303.09752;
  eps-scaling as in CoDA, https://arxiv.org/abs/2304.04947).
- :func:`soft_topk_numpy` sorts: for every number m of saturated entries the threshold has a closed form, and the right m is the
  first that is consistent. It iterates on nothing.

All of them take rows, scores [R, n], with k and eps a number or one value a row, and follow the contract for odd input:
NaN in a valid entry makes the row NaN, -inf counts as masked, +inf is saturated.

The torch versions are plain eager code in any dtype. In float32 they are the yardstick that a kernel's error is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
K_FLOOR = 1e-20
MOST_REACH = 2.0**32
"""The most that ``Truth.reach`` is. Thresholds farther apart have to have exponentials of their own: one for all of them would lose
weights that can be seen."""


def eps_schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> list[float]:
    """eps_0 … eps_T as published: eps_0 = max(eps_init or eps, eps), then max(eps * eps_decay, eps)."""
    current = max(eps_init or eps, eps)
    schedule = [current]
    for _ in range(n_iters):
        current = max(current * eps_decay, eps)
        schedule.append(current)
    return schedule


@dataclass(frozen=True)
class Rows:
    """Rows of input in float64, with what is valid worked out.

    Attributes:
        s: [R, n]; -inf where an entry does not count, NaN replaced by -inf.
        k: [R].
        eps: [R].
        valid: [R, n], entries that count.
        nan: [R], rows that must be NaN throughout.
    """

    s: Array
    k: Array
    eps: Array
    valid: NDArray[np.bool_]
    nan: NDArray[np.bool_]


def rows_of(s: Any, k: Any, eps: Any, mask: Any | None) -> Rows:
    """Brings input into :class:`Rows`."""
    s = np.atleast_2d(np.array(s, dtype=np.float64))
    rows = s.shape[0]
    k = np.broadcast_to(np.asarray(k, dtype=np.float64).reshape(-1), (rows,)).copy()
    eps = np.broadcast_to(np.asarray(eps, dtype=np.float64).reshape(-1), (rows,)).copy()
    keep = np.ones(s.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask, bool), s.shape)
    s[~keep] = -np.inf
    nan = np.isnan(s).any(axis=1) | np.isnan(k) | ~(eps > 0) | ~np.isfinite(eps)
    s = np.where(np.isnan(s), -np.inf, s)
    return Rows(s, k, eps, s > -np.inf, nan)


@dataclass(frozen=True)
class Truth:
    """What an oracle says of a batch of rows.

    Attributes:
        lam: [R, n].
        threshold: [R]: tau of the exact solver, -a_T of coordinate descent; ±inf in rows that are all 1 or all 0.
        grad_scores: [R, n], grad_k, grad_eps: [R], for the given gradient of lam (None without one; coordinate descent has no
            grad_eps).
        error_lam: [R], the error of ‖lam‖ to expect of arithmetic with unit roundoff 1: multiply by the roundoff of a type.
        error_scores, error_k, error_eps: [R], likewise for the gradients.
        slack_scores, slack_k, slack_eps: [R], what the gradients may change by, absolutely, where scores lie so near a
            threshold that rounding decides whether they are saturated (a kink: the gradient jumps there). 0 without one.
        reach: [R], exp of how far apart the thresholds -a_t of all iterations at eps_T lie, over eps_T: so much larger may a
            weight of coordinate descent be than an exponential that they share. 1 of the exact solver, which has one threshold.
        mass: [R], the sum of the lam of the exact solver that are not saturated, by which its gradient of k is divided; at least
            the roundoff, since what is left of a budget beside saturated entries is not known to less, or inf where it is 0.
    """

    lam: Array
    threshold: Array
    grad_scores: Array | None
    grad_k: Array | None
    grad_eps: Array | None
    error_lam: Array
    error_scores: Array
    error_k: Array
    error_eps: Array
    slack_scores: Array
    slack_k: Array
    slack_eps: Array
    reach: Array | float = 1.0
    mass: Array | float = 1.0


def _norm(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.sqrt(np.sum(x * x, axis=-1))


# --- the exact solver ------------------------------------------------------------------------------------------------


def soft_topk_numpy(s: Any, k: Any, eps: Any, mask: Any | None = None) -> tuple[Array, Array]:
    """The exact optimum by sorting, in float64.

    With the m largest scores saturated the others must carry k - m, so

        tau_m = eps (logsumexp(s_{m+1..n} / eps) - log(k - m)),

    and the answer is the first m for which no other entry would exceed 1: s_{m+1} <= tau_m.

    Args:
        s: scores [R, n] (or [n]).
        k: the budget, a number or [R]; taken within [0, number of valid entries].
        eps: the temperature, a number or [R].
        mask: bool [R, n], True = valid.

    Returns:
        lam [R, n] and tau [R].
    """
    rows = rows_of(s, k, eps, mask)
    anchor, offset = _solve(rows)
    return _lam(rows, anchor, offset), anchor + offset


def _solve(rows: Rows) -> tuple[Array, Array]:
    """tau [R] as an unevaluated sum: the largest score that is not saturated, and what tau differs from it by.

    A score of 10^4 and an eps of 0.03 leave their difference too few digits in one float64 to judge a float64 kernel by.
    """
    finite = np.isfinite(rows.s)
    n_inf = np.sum(rows.s == np.inf, axis=1)
    n_finite = finite.sum(axis=1)
    count, n = rows.s.shape
    budget = rows.k - n_inf
    full = rows.k >= n_finite + n_inf
    empty = ~full & (budget <= 0)
    easy = full | empty | rows.nan
    budget = np.where(easy, 1.0, budget)
    eps_rows = np.where(rows.nan, 1.0, rows.eps)
    anchor, offset = np.where(full, -np.inf, np.inf), np.zeros(count)
    if n:
        ordered = -np.sort(-np.where(finite, rows.s, -np.inf), axis=1)  # falling, what does not count last
        scaled = ordered / eps_rows[:, None]
        with np.errstate(invalid="ignore"):
            tail = np.logaddexp.accumulate(scaled[:, ::-1], axis=1)[:, ::-1]  # logsumexp of entries m+1 … n
        m = np.arange(n)
        left = budget[:, None] - m
        with np.errstate(divide="ignore", invalid="ignore"):
            candidates = eps_rows[:, None] * (tail - np.log(np.where(left > 0, left, np.nan)))
            low_enough = ordered <= candidates
            # where s/eps is too large for the logarithms to count in one float64: the same, relative to each entry
            size = np.where(np.isfinite(scaled), np.abs(scaled), 0.0).max(axis=1)
            coarse = np.flatnonzero(size > COARSE)
            relative = _relative_tails(ordered[coarse], eps_rows[coarse])
            low_enough[coarse] = relative >= np.log(np.where(left > 0, left, np.nan))[coarse]
            consistent = (left > 0) & low_enough & (m < n_finite[:, None])
        # where k - m <= 1 no other entry can exceed 1, whatever rounding says of a tie
        consistent |= (left > 0) & (left <= 1) & (m < n_finite[:, None])
        first = np.argmax(consistent, axis=1)
        # the running sum above is right to n roundings; this one, pairwise, to a few
        top = ordered[np.arange(count), first]
        with np.errstate(invalid="ignore", over="ignore"):
            z = (ordered - top[:, None]) / eps_rows[:, None]
            total = np.where(m >= first[:, None], np.exp(np.minimum(z, 0.0)), 0.0).sum(axis=1)
            gap = eps_rows * np.log(total / (budget - first))
        anchor, offset = np.where(easy, anchor, top), np.where(easy, 0.0, gap)
    return np.where(rows.nan, np.nan, anchor), offset


COARSE = 2.0**22
"""Scores in units of eps beyond which an ulp of them is no longer small beside what their logarithms decide."""


def _relative_tails(ordered: Array, eps: Array) -> Array:
    """log sum_{i >= m} exp((v_i - v_m)/eps) for falling v, [R, n]: right however large v/eps is.

    By doubling: from the sums of the ``reach`` entries from m on, and how far the entry behind them lies from v_m, those of twice
    as many follow.
    """
    tails, below = np.zeros_like(ordered), np.full_like(ordered, -np.inf)
    with np.errstate(invalid="ignore"):
        gaps = (ordered[:, 1:] - ordered[:, :-1]) / eps[:, None]
    below[:, :-1] = np.where(np.isfinite(ordered[:, 1:]), gaps, -np.inf)
    reach, n = 1, ordered.shape[1]
    while reach < n and ordered.size:
        tails[:, :-reach] = np.logaddexp(tails[:, :-reach], below[:, :-reach] + tails[:, reach:])
        below[:, :-reach] += below[:, reach:]
        below[:, n - reach :] = -np.inf
        reach *= 2
    return tails


def _distance(rows: Rows, anchor: Array, offset: Array) -> Array:
    """s - tau, [R, n]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (rows.s - anchor[:, None]) - offset[:, None]


def _lam(rows: Rows, anchor: Array, offset: Array) -> Array:
    tau = anchor
    with np.errstate(invalid="ignore", over="ignore"):
        lam = np.exp(np.minimum(_distance(rows, anchor, offset) / rows.eps[:, None], 0.0))
    lam = np.where(rows.s == np.inf, 1.0, lam)
    lam = np.where(rows.valid & (rows.k > 0)[:, None], lam, 0.0)
    lam = np.where(np.isneginf(tau)[:, None] & rows.valid, 1.0, lam)
    return np.where(rows.nan[:, None], np.nan, lam)


def soft_topk_truth(s: Any, k: Any, eps: Any, mask: Any | None = None, g: Any | None = None, unit: float = 2.0**-24) -> Truth:
    """The exact optimum and, for a gradient ``g`` [R, n] of lam, its gradients by implicit differentiation, in float64.

    With U the unsaturated valid entries: gbar = sum_U lam g / sum_U lam, ds = lam (g - gbar)/eps on U, dk = gbar,
    deps = -sum (s - tau) ds / eps; all 0 where U carries nothing. ``unit`` is the roundoff of the arithmetic that is judged.
    """
    rows = rows_of(s, k, eps, mask)
    anchor, offset = _solve(rows)
    lam = _lam(rows, anchor, offset)
    eps_rows = np.where(rows.nan, 1.0, rows.eps)
    inner = np.isfinite(anchor)
    d = np.where(np.isfinite(rows.s) & inner[:, None], _distance(rows, anchor, offset), 0.0)
    z = d / eps_rows[:, None]
    free = (d < 0) & (lam > 0)
    # exp rounds; its argument rounds three times (s - tau, 1/eps, their product: |z| each); the sum that fixes tau rounds (a
    # tree: a few ulps)
    entry_error = 8.0 + 3.0 * np.abs(z)
    error_lam = _norm(np.where(free, np.nan_to_num(lam) * entry_error, 0.0)) + 1.0
    # a score this near to tau may be taken for saturated or not
    near = np.isfinite(rows.s) & inner[:, None] & (np.abs(z) <= 16.0 * unit * (1.0 + np.abs(offset) / eps_rows)[:, None])
    left = np.where(near | ~free, 0.0, lam).sum(axis=1)
    # a whole number of entries saturated, and a gap behind them: a sum reaches k to within the rounding of k, and what is left
    # of that lies on any of the others
    spare = unit * (16.0 + np.where(rows.nan, 0.0, np.minimum(np.maximum(rows.k, 0.0), lam.shape[1])))
    whole = near.any(axis=1) & (left <= spare)
    error_lam = error_lam + np.where(whole, spare / unit, 0.0)
    zero = np.zeros(lam.shape[0])
    if g is None:
        return Truth(lam, anchor + offset, None, None, None, error_lam, zero, zero, zero, zero, zero, zero)
    g = np.atleast_2d(np.asarray(g, dtype=np.float64))
    weight = np.where(free, lam, 0.0)
    mass = weight.sum(axis=1)
    safe = np.where(mass > 0, mass, 1.0)
    gbar = np.where(mass > 0, np.where(free, weight * g, 0.0).sum(axis=1) / safe, 0.0)
    away = np.where(free, g - gbar[:, None], 0.0)
    grad_s = weight * away / eps_rows[:, None]
    grad_eps = -(d * grad_s).sum(axis=1) / eps_rows
    # gbar's own error: every lam is off by that much, and so are the products with g
    spread = np.where(free, np.abs(g), 0.0) + np.abs(gbar)[:, None]
    error_k = (weight * entry_error * spread).sum(axis=1) / safe
    entry = weight * (entry_error * spread + error_k[:, None]) / eps_rows[:, None]
    error_eps = (np.abs(d) * entry).sum(axis=1) / eps_rows
    # the gradient of a score near tau comes or goes, and gbar moves with it
    jump = np.where(near, np.abs(g - gbar[:, None]), 0.0)
    part = near | free | (whole[:, None] & np.isfinite(rows.s) & inner[:, None] & (d < 0))
    # gbar is a mean of g whatever is saturated
    span = np.where(part, g, -np.inf).max(axis=1, initial=-np.inf) - np.where(part, g, np.inf).min(axis=1, initial=np.inf)
    little = left < 1e-6 * safe  # the jump of gbar is lost in the rounding of g - gbar
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shift = np.where(little, np.inf, jump.sum(axis=1) / left)
    shift = np.where(near.any(axis=1), np.minimum(shift, np.maximum(span, 0.0)), 0.0)
    # there nothing may be left, and dk is 0
    largest = np.where(part, np.abs(g), 0.0).max(axis=1, initial=0.0)
    slack_k = np.where(whole, np.maximum(shift, largest), shift)
    # scores that are equal are saturated together: then the others alone see gbar move
    highest = np.where(near, rows.s, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(near, rows.s, np.inf).min(axis=1, initial=np.inf)
    moved = np.where(part & ~(near & (highest == lowest)[:, None]), lam, 0.0) * shift[:, None]
    spared = np.where(whole, spare * 2.0 * largest, 0.0) / eps_rows
    slack_s = _norm((jump + moved) / eps_rows[:, None]) + spared
    farthest = np.where(part, np.abs(d), 0.0).max(axis=1, initial=0.0)
    slack_eps = (np.abs(d) * (jump + moved)).sum(axis=1) / eps_rows**2 + farthest * spared / eps_rows
    row_nan = np.where(rows.nan, np.nan, 0.0)
    return Truth(
        lam, anchor + offset, grad_s + row_nan[:, None], gbar + row_nan, grad_eps + row_nan,
        error_lam, _norm(entry), error_k, error_eps, slack_s, slack_k, slack_eps,
        mass=np.where(mass > 0, np.maximum(mass, unit), np.inf),
    )  # fmt: skip


# --- coordinate descent ----------------------------------------------------------------------------------------------


def coordinate_descent_numpy(
    s: Any,
    k: Any,
    n_iters: int,
    eps: float,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Any | None = None,
) -> tuple[Array, Array]:
    """The published recurrence in float64, with b as a vector.

    Args:
        s: scores [R, n] (or [n]).
        k: the budget, a number or [R] (the caller clamps a tensor's values).
        n_iters: T.
        eps, eps_init, eps_decay: the schedule, see :func:`eps_schedule`.
        mask: bool [R, n], True = valid.

    Returns:
        lam [R, n] and the trace of a, [T, R], a_1 … a_T.
    """
    truth, trace = _descend(rows_of(s, k, eps, mask), n_iters, eps, eps_init, eps_decay, None)
    return truth.lam, trace


def coordinate_descent_truth(
    s: Any,
    k: Any,
    n_iters: int,
    eps: float,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Any | None = None,
    g: Any | None = None,
    unit: float = 2.0**-24,
) -> Truth:
    """The published recurrence and, for a gradient ``g`` [R, n] of lam, its gradients by reverse mode, in float64.

    ``unit`` is the roundoff of the arithmetic that is judged.
    """
    return _descend(rows_of(s, k, eps, mask), n_iters, eps, eps_init, eps_decay, g, unit)[0]


def _descend(
    rows: Rows,
    n_iters: int,
    eps: float,
    eps_init: float | None,
    eps_decay: float,
    g: Any | None,
    unit: float = 2.0**-24,
) -> tuple[Truth, Array]:
    schedule = eps_schedule(n_iters, eps, eps_init, eps_decay)
    saturated = rows.s == np.inf
    dead = ~rows.valid.any(axis=1) | (rows.k <= 0)
    easy = rows.nan | dead
    valid = rows.valid & ~easy[:, None]
    # a +inf score is saturated from the first clamp on: its b is -(s + a), so s + b is -a
    s = np.where(valid & ~saturated, rows.s, 0.0)
    log_k = np.log(np.maximum(np.where(easy, 1.0, rows.k), K_FLOOR))
    b = -s
    a = np.zeros(s.shape[0])
    trace: list[Array] = []
    softmaxes: list[Array] = []
    clamped: list[NDArray[np.bool_]] = []
    error = np.zeros(s.shape[0])  # of a_t, in units of the roundoff
    near: list[NDArray[np.bool_]] = []  # scores so near to a clamp that rounding decides
    for t in range(n_iters):
        e = schedule[t]
        x = np.zeros_like(s) if t == 0 else np.where(saturated, -a[:, None], s + b)
        x = np.where(valid, x / e, -np.inf)
        top = np.where(easy, 0.0, x.max(axis=1, initial=-np.inf))
        p = np.where(valid, np.exp(x - top[:, None]), 0.0)
        total = np.where(easy, 1.0, p.sum(axis=1))
        p = p / total[:, None]
        a = e * (log_k - (np.log(total) + top))
        over = valid & (saturated | (s + a[:, None] > 0))
        b = np.where(over, -(s + a[:, None]), 0.0)
        # running error: what a step hands on of the last error is the clamped share of the softmax, what it adds is the
        # rounding of a, of the shift, and of eps (log k - log sum)
        handed = np.where(clamped[-1], p, 0.0).sum(axis=1) if clamped else 0.0
        # and, where clamped, what s + b loses of -a in this very float64 computation
        lost = np.where(clamped[-1], 2.0 * np.abs(s) * p, 0.0).sum(axis=1) * (2.0**-53 / unit) if clamped else 0.0
        rounding = lost + 4.0 * np.abs(a) + 2.0 * np.abs(top) * e + e * (8.0 + np.abs(log_k) + np.abs(np.log(total)))
        error = handed * error + rounding
        near.append(valid & ~saturated & (np.abs(s + a[:, None]) <= unit * error[:, None]))
        trace.append(a)
        softmaxes.append(p)
        clamped.append(over)
    e = schedule[n_iters]
    z = np.where(saturated, 0.0, (s + a[:, None] + b) / e)
    with np.errstate(over="ignore"):
        lam = np.where(valid, np.exp(z), 0.0)  # above 1, or beyond all numbers, where k is a number above n, as published
    error_lam = _norm(lam * (8.0 + 3.0 * np.abs(z) + np.where(clamped[-1], 0.0, error[:, None] / e))) + 1.0
    lam = np.where(rows.nan[:, None], np.nan, lam)
    zero = np.zeros(s.shape[0])
    threshold = np.where(dead, np.inf, -a)
    threshold = np.where(rows.nan, np.nan, threshold)
    apart = np.ptp([a_t for a_t, e_t in zip(trace, schedule[1:], strict=True) if e_t == e], axis=0)
    reach = np.exp(np.minimum(apart / e, np.log(MOST_REACH)))
    if g is None:
        return Truth(lam, threshold, None, None, None, error_lam, zero, zero, zero, zero, zero, zero), np.array(trace)
    g = np.where(valid, np.atleast_2d(np.asarray(g, dtype=np.float64)), 0.0)
    full = g * np.nan_to_num(lam) / e
    at = np.where(clamped[-1] | ~valid, 0.0, full)
    grad_s = at.copy()
    adjoint = at.sum(axis=1)
    # rounding, as relative errors of lam and p (through a) and the sums'; a kink, as the jump of what it lets come or go
    magnitude = np.abs(at) * ((16.0 + error / e)[:, None] + 3.0 * np.abs(z))
    weight = magnitude.sum(axis=1)
    jumps = np.where(near[-1], np.abs(full), 0.0)
    jump = jumps.sum(axis=1)
    dlog_k, error_log_k, jump_log_k = zero.copy(), zero.copy(), zero.copy()
    for t in range(n_iters - 1, 0, -1):
        e_t, p, over, close = schedule[t], softmaxes[t], clamped[t - 1], near[t - 1]
        size = np.abs(adjoint) + jump
        dlog_k = dlog_k + adjoint * e_t
        error_log_k = error_log_k + weight * e_t
        jump_log_k = jump_log_k + jump * e_t
        grad_s -= np.where(over | ~valid, 0.0, adjoint[:, None] * p)
        sharper = weight + size * (16.0 + error / e_t)
        # the exponent of p rounds in proportion to its size
        exponent = np.abs(np.log(np.where(p > 0, p, 1.0)))
        magnitude += np.where(over, 0.0, p * (sharper[:, None] + size[:, None] * exponent))
        jumps += np.where(close, size[:, None] * p, np.where(over, 0.0, jump[:, None] * p))
        share, unsure = np.where(over, p, 0.0).sum(axis=1), np.where(close, p, 0.0).sum(axis=1)
        carried = np.where(over | close, p * exponent, 0.0).sum(axis=1)
        weight = sharper * np.minimum(share + unsure, 1.0) + size * carried
        jump = jump * share + size * unsure
        adjoint = adjoint * share
    dlog_k = dlog_k + adjoint * schedule[0]
    error_log_k = error_log_k + weight * schedule[0]
    jump_log_k = jump_log_k + jump * schedule[0]
    above = ~easy & (rows.k >= K_FLOOR)
    safe = np.where(above, rows.k, 1.0)
    grad_k = np.where(above, dlog_k / safe, 0.0)
    error_k = np.where(above, error_log_k / safe, 0.0) + np.abs(grad_k)
    slack_k = np.where(above, jump_log_k / safe, 0.0)
    row_nan = np.where(rows.nan, np.nan, 0.0)
    truth = Truth(
        lam, threshold, grad_s + row_nan[:, None], grad_k + row_nan, None,
        error_lam, _norm(np.where(valid, magnitude, 0.0)), error_k, zero, _norm(jumps), slack_k, zero, reach,
    )  # fmt: skip
    return truth, np.array(trace)


# --- plain torch -----------------------------------------------------------------------------------------------------


def coordinate_descent_torch(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    *,
    n_iters: int,
    eps: float,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The published recurrence in eager torch, in the scores' own dtype; autograd unrolls it.

    Args:
        scores: [R, n]; k: a number or [R]; mask: bool [R, n], True = valid.

    Returns:
        lam [R, n], differentiable in scores and k.
    """
    lowest = -torch.finfo(scores.dtype).max
    k = k.reshape(-1, 1) if isinstance(k, torch.Tensor) else torch.full((1, 1), k, dtype=scores.dtype, device=scores.device)
    log_k = torch.log(k.clamp(min=K_FLOOR))
    if mask is not None:
        scores = scores.masked_fill(~mask, lowest)
    b = -scores
    schedule = eps_schedule(n_iters, eps, eps_init, eps_decay)
    a = torch.zeros((), dtype=scores.dtype, device=scores.device)
    for e in schedule[:n_iters]:
        x = (scores + b) / e
        if mask is not None:
            x = x.masked_fill(~mask, lowest)
        a = e * (log_k - x.logsumexp(dim=-1, keepdim=True))
        b = -torch.relu(scores + a)
    lam = ((scores + a + b) / schedule[-1]).exp()
    return lam if mask is None else lam.masked_fill(~mask, 0.0)


class _SoftTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, k: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor | None) -> Any:
        s = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        n_valid = (s > -torch.inf).sum(dim=-1, keepdim=True)
        ordered = s.sort(dim=-1, descending=True).values
        tail = (ordered / eps).flip(-1).logcumsumexp(dim=-1).flip(-1)
        m = torch.arange(s.shape[-1], device=s.device)
        left = k - m
        candidates = eps * (tail - left.clamp(min=torch.finfo(s.dtype).tiny).log())
        consistent = (left > 0) & (m < n_valid) & ((ordered <= candidates) | (left <= 1))
        first = consistent.to(torch.uint8).argmax(dim=-1, keepdim=True)
        tau = candidates.gather(-1, first)
        tau = torch.where(k >= n_valid, -torch.inf, torch.where(k <= 0, torch.inf, tau))
        d = s - tau
        lam = torch.where(s > -torch.inf, (d / eps).clamp(max=0).exp(), 0.0)
        free = (d < 0) & (lam > 0)
        ctx.save_for_backward(torch.where(free, d, 0.0), torch.where(free, lam, 0.0), eps)
        return lam

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        d, weight, eps = ctx.saved_tensors
        grad = torch.where(weight > 0, grad, 0.0)
        mass = weight.sum(dim=-1, keepdim=True)
        gbar = torch.where(mass > 0, (weight * grad).sum(dim=-1, keepdim=True) / mass, 0.0)
        ds = weight * (grad - gbar) / eps
        return ds, gbar, -(d * ds).sum(dim=-1, keepdim=True) / eps, None


def soft_topk_torch(
    scores: torch.Tensor, k: torch.Tensor | float, *, eps: torch.Tensor | float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The exact optimum in eager torch by sorting, in the scores' own dtype, with the implicit gradient.

    Args:
        scores: [R, n]; k, eps: a number or [R]; mask: bool [R, n], True = valid.

    Returns:
        lam [R, n], differentiable in scores, k and eps.
    """

    def column(value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.reshape(-1, 1).to(scores.dtype).expand(scores.shape[0], 1)
        return torch.full((scores.shape[0], 1), value, dtype=scores.dtype, device=scores.device)

    if scores.numel() == 0:
        return scores * 0
    return _SoftTopk.apply(scores, column(k), column(eps), mask)
