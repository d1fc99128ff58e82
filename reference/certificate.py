"""The certificate of optimality of an exact solution: no oracle needed, only the scores and the answer.

For  max s·lam + eps H(lam)  s.t.  0 <= lam <= 1, sum lam = k,  H(lam) = -sum lam (log lam - 1),  the optimality conditions are

- feasibility: 0 <= lam <= 1 and sum lam = k;
- stationarity: s - eps log lam is one number tau wherever 0 < lam < 1, and s >= tau wherever lam = 1;
- duality: the dual  D(tau) = k tau + sum [s >= tau](s - tau + eps) + sum [s < tau] eps exp((s - tau)/eps)  equals the primal value.

Everything is computed in float64, whatever the dtype of lam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .oracles import Array, rows_of


@dataclass(frozen=True)
class Certificate:
    """One number a row, [R], each 0 for the exact optimum and NaN for a NaN row.

    Attributes:
        box: how far the entries leave [0, 1].
        budget: |sum lam - k|, k taken within [0, number of valid entries].
        stationarity: the largest |s - eps log lam - tau| / eps over unsaturated entries of normal size (lam >= ``floor``),
            and the largest (tau - s)/eps over saturated ones; tau is the mean of the unsaturated entries weighted by lam.
        duality_gap: D(tau) - primal, relative to eps k.
    """

    box: Array
    budget: Array
    stationarity: Array
    duality_gap: Array


def certify(s: Any, lam: Any, k: Any, eps: Any, mask: Any | None = None, floor: float = 1e-6) -> Certificate:
    """The certificate of every row.

    Args:
        s: scores [R, n].
        lam: the answer, [R, n], of any float dtype.
        k, eps: a number or [R].
        mask: bool [R, n], True = valid.
        floor: entries of lam below it have no part in stationarity (they may be subnormal in their dtype).
    """
    rows = rows_of(s, k, eps, mask)
    lam = np.atleast_2d(np.asarray(lam, dtype=np.float64))
    eps_rows = np.where(rows.nan, 1.0, rows.eps)
    # +inf has weight 1 whatever k is, but for k = 0
    least = np.where(rows.k > 0, (rows.s == np.inf).sum(axis=1), 0)
    k_rows = np.minimum(np.maximum(rows.k, least), rows.valid.sum(axis=1))
    box = np.maximum(np.maximum(-lam, lam - 1.0).max(axis=1, initial=0.0), np.abs(np.where(rows.valid, 0.0, lam)).sum(axis=1))
    budget = np.abs(lam.sum(axis=1) - k_rows)
    finite = np.isfinite(rows.s)
    free = finite & (lam >= floor) & (lam < 1.0)
    ones = finite & (lam >= 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(free, rows.s - eps_rows[:, None] * np.log(np.where(free, lam, 1.0)), 0.0)
    weight = np.where(free, lam, 0.0)
    mass = weight.sum(axis=1)
    tau = np.where(mass > 0, (weight * level).sum(axis=1) / np.where(mass > 0, mass, 1.0), 0.0)
    off = np.where(free, np.abs(level - tau[:, None]), 0.0)
    over = np.where(ones & (mass > 0)[:, None], tau[:, None] - np.where(finite, rows.s, 0.0), 0.0)
    stationarity = np.maximum(off.max(axis=1, initial=0.0), over.max(axis=1, initial=0.0)) / eps_rows

    d = np.where(finite, rows.s, 0.0) - tau[:, None]
    with np.errstate(over="ignore"):
        dual_terms = np.where(d >= 0, d + eps_rows[:, None], eps_rows[:, None] * np.exp(np.minimum(d / eps_rows[:, None], 0)))
    positive = np.where(finite & (lam > 0), lam, 1.0)
    primal_terms = np.where(finite & (lam > 0), lam * (d - eps_rows[:, None] * (np.log(positive) - 1.0)), 0.0)
    gap = np.where(finite, dual_terms - primal_terms, 0.0).sum(axis=1)
    with np.errstate(over="ignore"):
        gap = np.where(mass > 0, gap / (eps_rows * np.maximum(k_rows, 1e-300)), 0.0)
    nan = np.where(rows.nan, np.nan, 0.0)
    return Certificate(box + nan, budget + nan, stationarity + nan, gap + nan)
