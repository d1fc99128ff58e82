"""The verification suite: any implementation of the two operators against float64, on whatever device it runs.

    from coordroute.reference import verify
    report = verify.run({"soft_topk": my_soft_topk}, device="cuda", examples=25, seed=0)

An implementation is called as

    soft_topk(scores, k, eps=..., mask=...)
    coordinate_descent(scores, k, n_iters=..., eps=..., eps_init=..., eps_decay=..., mask=...)

with scores [R, n], k a number or a tensor [R], eps of soft_topk likewise, and mask bool [R, n] (True = valid), which is only
passed where a row has an entry that does not count. It returns lam [R, n] and is differentiable.

A :class:`Case` is a batch of rows of named families; it is small, hashable, and its ``repr`` is code that makes it again.
:func:`examine` runs one case and measures every property of every row against its bound. :func:`run` lets hypothesis draw
cases; batches are drawn rather than rows, for a launch each row would be too slow on a GPU, and a failing case is shrunk to few
and short rows. Nothing here imports a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from . import compare, families, oracles
from .certificate import certify
from .oracles import Array, Truth

Target = Callable[..., torch.Tensor]
Progress = Callable[[int, int, str, float | None], None]
"""Called with (total, done, text, seconds left or None)."""

KINDS = ("soft_topk", "coordinate_descent")
DTYPES = ("float32", "bfloat16", "float16", "float64")

SLACK_SHARE, TERMS = 0.1, 16.0
"""A row counts as left out of a gradient comparison where its kinks alone may move the gradient by more than this share of it,
or of the terms of which it is the sum: at a small eps they may all but cancel. The oracle's running error is some 16 roundings
of each term."""

SHRINK_SECONDS, SHRINK_SECONDS_IN_ALL = 15.0, 60.0
"""How long one counterexample, and all of an operator and dtype, are shrunk."""

PROPERTIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "runs": ("it returns a tensor of the scores' shape, dtype and device, and gradients, without an error", KINDS),
    "values": ("lam against the float64 oracle", KINDS),
    "grad scores": ("the gradient of the scores against the float64 oracle", KINDS),
    "grad k": ("the gradient of a tensor k against the float64 oracle", KINDS),
    "grad eps": ("the gradient of a tensor eps against the float64 oracle", ("soft_topk",)),
    "box": ("0 <= lam <= 1, and 0 where masked", KINDS),
    "budget": ("sum lam = k", ("soft_topk",)),
    "stationarity": ("s - eps log lam is one number where 0 < lam < 1, not above s where lam = 1", ("soft_topk",)),
    "duality gap": ("the dual value equals the primal one", ("soft_topk",)),
    "replays bitwise": ("the same call twice gives the same bits, values and gradients", KINDS),
    "inputs untouched": ("no input is written to", KINDS),
    "row alone": ("a row does not depend on the rows beside it", KINDS),
    "permutation": ("permuted scores give permuted weights", KINDS),
    "masked tail": ("appended masked entries change nothing", KINDS),
    "scale": ("lam(2 s, 2 eps) = lam(s, eps)", KINDS),
}
"""What is checked: name -> (sentence, operators)."""


@dataclass(frozen=True)
class Case:
    """A batch of rows and how the operator is called on it.

    Attributes:
        op: "soft_topk" or "coordinate_descent".
        dtype: of the scores, such as "float32".
        n: length of the rows.
        rows: (family, seed) of every row.
        eps: temperature; of coordinate descent the final one.
        n_iters, eps_init, eps_decay: of coordinate descent.
        tensor_k: k as a tensor, one value a row; else every row has the first one's k, as a number.
        tensor_eps: likewise for eps of soft_topk; the values differ from row to row.
        layout: how the scores lie in memory, one of ``families.LAYOUTS``.
    """

    op: str
    dtype: str = "float32"
    n: int = 1
    rows: tuple[tuple[str, int], ...] = (("normal", 0),)
    eps: float = 0.1
    n_iters: int = 20
    eps_init: float | None = None
    eps_decay: float = 1.0
    tensor_k: bool = True
    tensor_eps: bool = False
    layout: str = "contiguous"

    def schedule(self) -> dict[str, Any]:
        if self.op == "soft_topk":
            return {}
        return {"n_iters": self.n_iters, "eps_init": self.eps_init, "eps_decay": self.eps_decay}


class Inputs(NamedTuple):
    """A case drawn: float64 arrays that hold exactly what the dtypes of the call can hold."""

    s: Array  # [R, n]
    valid: families.BoolArray  # [R, n]
    k: Array  # [R]
    eps: Array  # [R]
    g: Array  # [R, n], the gradient of lam


class Found(NamedTuple):
    """What an implementation returned, in float64; None for a gradient that does not exist."""

    lam: Array
    grad_scores: Array
    grad_k: Array | None
    grad_eps: Array | None


@dataclass
class Finding:
    """One property measured on one case.

    Attributes:
        name: the property.
        error: [R].
        bound: [R]: the property holds for a row where error <= bound.
        left_out: [R], rows that were not compared.
        message: what happened, where a number does not say it.
    """

    name: str
    error: Array
    bound: Array
    left_out: families.BoolArray
    message: str = ""

    @property
    def ratio(self) -> Array:
        """error / bound, [R]; 0 for rows that were left out, inf where anything but 0 is too much."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(self.error > 0, self.error / self.bound, 0.0)
        return np.where(self.left_out, 0.0, np.where(np.isnan(found), np.inf, found))

    @property
    def worst(self) -> int:
        return int(np.argmax(self.ratio))

    @property
    def holds(self) -> bool:
        return bool((self.ratio <= 1.0).all())

    def to_text(self) -> str:
        if self.message:
            return f"{self.name}: {self.message}"
        at = self.worst
        verdict = "holds" if self.holds else "FAILS"
        return f"{self.name}: {verdict}; worst row {at}: error {self.error[at]:.3g}, bound {self.bound[at]:.3g}"


def _rounded(values: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).to(torch.float64).numpy()


def draw(case: Case) -> Inputs:
    """The arrays of a case."""
    dtype = getattr(torch, case.dtype)
    compute = compare.compute_dtype(dtype)
    made = [families.FAMILIES[name].draw(np.random.default_rng([seed, case.n]), case.n) for name, seed in case.rows]
    s = _rounded(np.stack([row.scores for row in made]), dtype)
    valid = np.stack([row.valid for row in made])
    k = np.array([row.k for row in made])
    if not case.tensor_k:
        k = np.full_like(k, k[0])
    rng = np.random.default_rng([seed for _, seed in case.rows])
    eps = np.full_like(k, case.eps)
    if case.tensor_eps:
        eps = case.eps * rng.uniform(0.5, 2.0, len(k))
    # a large gradient at what does not count: it must have no part in anything
    g = np.where(valid & (s > -np.inf), rng.standard_normal(s.shape), 100.0)
    return Inputs(s, valid, _rounded(k, compute), _rounded(eps, compute) if case.tensor_eps else eps, _rounded(g, dtype))


# --- the truth of a case ---------------------------------------------------------------------------------------------


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """The float64 oracle's answer to a case."""
    unit = compare.roundoff(compare.compute_dtype(getattr(torch, case.dtype)))
    s, valid, k, eps, g = inputs
    if case.op == "soft_topk":
        return oracles.soft_topk_truth(s, k, eps, valid, g, unit)
    count = (valid & (s > -np.inf)).sum(axis=1)
    budget = np.minimum(k, count) if case.tensor_k else k
    truth = oracles.coordinate_descent_truth(s, budget, eps=case.eps, mask=valid, g=g, unit=unit, **case.schedule())
    if case.tensor_k and truth.grad_k is not None:
        # k was clamped: there is nothing to differentiate beyond
        truth = replace(truth, grad_k=np.where(k > count, 0.0 * truth.grad_k, truth.grad_k))
    return truth


def _call(
    target: Target, case: Case, inputs: Inputs, device: torch.device, dtype: torch.dtype, layout: str, grad: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor]]]:
    """(lam, gradients of scores, k and eps, and every input beside a copy of it from before the call)."""
    compute = compare.compute_dtype(dtype)

    def tensor(values: Any, kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(kind).to(device)

    scores = families.laid_out(tensor(inputs.s, dtype), layout).detach().requires_grad_(grad)
    k: Any = tensor(inputs.k, compute).requires_grad_(grad) if case.tensor_k else float(inputs.k[0])
    eps: Any = tensor(inputs.eps, compute).requires_grad_(grad) if case.tensor_eps else case.eps
    extra: dict[str, Any] = dict(case.schedule())
    if not inputs.valid.all():
        extra["mask"] = families.laid_out(tensor(inputs.valid, torch.bool), layout)
    given = [value for value in (scores, k, eps, extra.get("mask")) if isinstance(value, torch.Tensor)]
    copies = [value.detach().clone() for value in given]
    _poison(scores)
    lam = target(scores, k, eps=eps, **extra)
    if not isinstance(lam, torch.Tensor):
        raise TypeError(f"it returned a {type(lam).__name__}, not a tensor")
    if lam.shape != scores.shape or lam.dtype != dtype or lam.device != scores.device:
        raise TypeError(
            f"it returned {tuple(lam.shape)} {lam.dtype} on {lam.device} for {tuple(scores.shape)} {dtype} on {scores.device}"
        )
    gradients: list[torch.Tensor | None] = [None, None, None]
    if grad:
        leaves = [value for value in (scores, k, eps) if isinstance(value, torch.Tensor)]
        _poison(scores)
        made = iter(torch.autograd.grad(lam, leaves, tensor(inputs.g, dtype)))
        gradients = [next(made) if isinstance(value, torch.Tensor) else None for value in (scores, k, eps)]
    return lam.detach(), gradients, [(one.detach(), copy) for one, copy in zip(given, copies, strict=True)]


def _poison(like: torch.Tensor) -> None:
    """Leaves NaN in the memory that an allocation of this size is likely to get next."""
    spoiled = [torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device) for _ in range(2)]
    del spoiled


def _numpy(value: torch.Tensor | None) -> Array | None:
    return None if value is None else value.detach().to("cpu", torch.float64).numpy()


def _found(lam: torch.Tensor, gradients: list[torch.Tensor | None]) -> Found:
    values = _numpy(lam)
    scores, k, eps = (_numpy(gradient) for gradient in gradients)
    if values is None or scores is None:
        raise TypeError("there is no gradient of the scores")
    return Found(values, scores, k, eps)


class _Plain(NamedTuple):
    """Errors of plain torch in the working precision, each [R]."""

    value: Array
    scores: Array
    k: Array
    eps: Array


def _plain_errors(case: Case, inputs: Inputs, truth: Truth) -> _Plain:
    plain = oracles.soft_topk_torch if case.op == "soft_topk" else oracles.coordinate_descent_torch
    count = (inputs.valid & (inputs.s > -np.inf)).sum(axis=1)
    clamped = inputs._replace(k=np.minimum(inputs.k, count)) if case.tensor_k else inputs
    compute = compare.compute_dtype(getattr(torch, case.dtype))
    lam, gradients, _ = _call(plain, case, clamped, torch.device("cpu"), compute, "contiguous")
    none = np.zeros(len(inputs.k))

    def error(found: torch.Tensor | None, wanted: Array | None) -> Array:
        return none if found is None or wanted is None else compare.row_errors(found.to(torch.float64).numpy(), wanted)

    scores, k, eps = gradients
    of_k = np.where(clamped.k < inputs.k, 0.0, error(k, truth.grad_k))  # a clamped k: exactly 0 is asked for
    return _Plain(error(lam, truth.lam), error(scores, truth.grad_scores), of_k, error(eps, truth.grad_eps))


class _Judged(NamedTuple):
    inputs: Inputs
    truth: Truth
    plain: _Plain


@functools.lru_cache(maxsize=64)
def _judge(case: Case) -> _Judged:
    """Inputs, truth and yardstick of a case; kept, since the candidates of a search are judged on the same cases."""
    inputs = draw(case)
    truth = truth_of(case, inputs)
    return _Judged(inputs, truth, _plain_errors(case, inputs, truth))


# --- the properties of a case ----------------------------------------------------------------------------------------


def examine(target: Target, case: Case, device: torch.device | str = "cpu", longest: int | None = None) -> list[Finding]:
    """Measures every property of every row of a case.

    Args:
        target: the implementation, called as the module says.
        case: what to run it on.
        device: where.
        longest: the longest rows that the implementation takes; None is any. "masked tail" makes rows of n + 3.

    Returns:
        The findings. An implementation that raises has one: "runs".
    """
    inputs, truth, plain = _judge(case)
    at, dtype = torch.device(device), getattr(torch, case.dtype)
    none, nobody = np.zeros(len(case.rows)), np.zeros(len(case.rows), bool)
    try:
        lam, gradients, given = _call(target, case, inputs, at, dtype, case.layout)
        again, more, _ = _call(target, case, inputs, at, dtype, case.layout)
        found = _found(lam, gradients)
        moved = list(_moved(target, case, inputs, at, longest))
    except Exception as raised:
        text = f"it raised {type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        return [Finding("runs", none + np.inf, none, nobody, text)]
    findings = [Finding("runs", none, none, nobody)]
    value_bound = compare.bound(plain.value, truth.error_lam, compare.storage_floor(truth.lam, dtype), dtype)
    findings.append(Finding("values", compare.row_errors(found.lam, truth.lam), value_bound, nobody))
    findings += _gradients(found, truth, plain, dtype)
    findings += _certificate(case, inputs, found.lam, dtype)
    differ = _differ(lam, again, gradients, more)
    findings.append(Finding("replays bitwise", differ, none, nobody))
    findings.append(Finding("inputs untouched", _touched(given, len(case.rows)), none, nobody))
    for name, row, other in moved:
        # both are within the bound of the same truth
        error = compare.row_errors(other, found.lam[row])
        findings.append(Finding(name, _spread(error, row, len(none)), 2.0 * value_bound, nobody))
    return findings


def _spread(error: Array, row: Any, count: int) -> Array:
    full = np.zeros(count)
    full[row] = error
    return full


def _gradients(found: Found, truth: Truth, plain: _Plain, dtype: torch.dtype) -> Iterator[Finding]:
    compute = compare.compute_dtype(dtype)
    table = (
        ("grad scores", found.grad_scores, truth.grad_scores, plain.scores, truth.error_scores, truth.slack_scores, dtype),
        ("grad k", found.grad_k, truth.grad_k, plain.k, truth.error_k, truth.slack_k, compute),
        ("grad eps", found.grad_eps, truth.grad_eps, plain.eps, truth.error_eps, truth.slack_eps, compute),
    )
    for name, mine, wanted, yardstick, error, slack, stored in table:
        if mine is None or wanted is None:
            continue
        size = np.abs(wanted) if wanted.ndim == 1 else np.sqrt(np.sum(wanted * wanted, axis=1))
        scale = np.maximum(np.nan_to_num(size), error / TERMS)
        left_out = (slack > SLACK_SHARE * scale) & (slack > 0)
        limit = compare.bound(yardstick, error, compare.storage_floor(wanted, stored), dtype) + np.where(left_out, 0.0, slack)
        yield Finding(name, compare.row_errors(mine, wanted, stored), limit, left_out)


def _certificate(case: Case, inputs: Inputs, lam: Array, dtype: torch.dtype) -> Iterator[Finding]:
    """Feasibility, and for the exact solver optimality, from the scores and the answer alone."""
    nobody = np.zeros(len(case.rows), bool)
    rows = oracles.rows_of(inputs.s, inputs.k, inputs.eps, inputs.valid)
    found = certify(inputs.s, lam, inputs.k, inputs.eps, inputs.valid)
    none = np.zeros(len(case.rows))
    known = ~rows.nan

    def error(values: Array) -> Array:
        return np.where(known, np.where(np.isnan(values), np.inf, values), 0.0)

    yield Finding("box", error(found.box), none, nobody)
    if case.op != "soft_topk":
        return
    unit, stored = compare.roundoff(compare.compute_dtype(dtype)), torch.finfo(dtype)
    smallest = stored.tiny * (1.0 if dtype in (torch.float32, torch.float64) else stored.eps)
    clean = np.nan_to_num(lam)
    free = (clean > 0) & (clean < 1) & np.isfinite(rows.s)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(free, np.abs(np.log(np.where(free, clean, 1.0))), 0.0)
        # relative error of an entry: exp and its argument, the threshold, storage, and what lies below the normal range
        relative = np.where(free, unit * (16.0 + z) + stored.eps / 2 + smallest / np.where(free, clean, 1.0), 0.0)
    # storing rounds to 1 what is a little below it: the lowest of the saturated, to within that
    ones = (clean >= 1) & np.isfinite(rows.s)
    lowest = np.where(ones, rows.s, np.inf).min(axis=1, initial=np.inf)
    width = stored.eps * np.where(rows.nan, 1.0, rows.eps)
    with np.errstate(invalid="ignore"):
        rounded = ones & (rows.s <= (lowest + width)[:, None])
    storage = np.where(rounded, stored.eps / 2, np.where(free, 0.0, smallest) * rows.valid).sum(axis=1)
    total = clean.sum(axis=1)
    summing = 2.0**-53 * total * (2.0 + math.log2(max(case.n, 1)))  # of the certificate itself, pairwise in float64
    limit = (clean * relative).sum(axis=1) + storage + unit * np.minimum(total, 1.0) + summing
    yield Finding("budget", error(found.budget), limit, nobody)
    resolved = free & (clean >= CERTIFIED)
    mass = np.where(resolved, clean, 0.0).sum(axis=1)
    mean = np.where(mass > 0, np.where(resolved, clean * relative, 0.0).sum(axis=1) / np.where(mass > 0, mass, 1.0), 0.0)
    most = np.where(resolved, relative, 0.0).max(axis=1, initial=0.0)
    # lam = 1 is also what rounding makes of an entry a little below it; float64 itself rounds s and tau
    with np.errstate(invalid="ignore"):
        scores = np.where(np.isfinite(rows.s), np.abs(rows.s), 0.0).max(axis=1, initial=0.0)
    own = 2.0**-50 * scores / np.where(rows.nan, 1.0, rows.eps)
    slope = most + mean + stored.eps + 16.0 * unit + own
    yield Finding("stationarity", error(found.stationarity), slope, nobody)
    # the gap is second order in the relative errors: eps lam d²/2 an entry; below the normal range lam itself is lost
    lost = rows.valid.sum(axis=1) * (smallest + CERTIFIED * 2.0**-40)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (np.where(free, clean * (relative + mean[:, None]) ** 2, 0.0).sum(axis=1) + lost) / np.maximum(rows.k, 1e-300)
        edge = rounded.sum(axis=1) * slope**2 / np.maximum(rows.k, 1e-300)
    cancel = own * rows.valid.sum(axis=1) / np.maximum(rows.k, 1e-300)
    yield Finding("duality gap", np.abs(error(found.duality_gap)), terms + edge + cancel + 2.0**-40, nobody)


CERTIFIED = 1e-6
"""Entries of lam below it have no part in stationarity (see :func:`certificate.certify`)."""


def _bits(value: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(kinds[value.element_size()])


def _differ(lam: torch.Tensor, again: torch.Tensor, one: list[torch.Tensor | None], two: list[torch.Tensor | None]) -> Array:
    """The number of entries of every row whose bits differ, [R]."""
    count = torch.zeros(lam.shape[0], dtype=torch.int64)
    for a, b in ((lam, again), *zip(one, two, strict=True)):
        if a is not None and b is not None:
            count += (_bits(a) != _bits(b)).reshape(lam.shape[0], -1).sum(dim=1).cpu()
    return count.to(torch.float64).numpy()


def _touched(given: list[tuple[torch.Tensor, torch.Tensor]], rows: int) -> Array:
    count = torch.zeros(rows, dtype=torch.int64)
    for after, before in given:
        count += (_bits(after) != _bits(before)).reshape(rows, -1).sum(dim=1).cpu()
    return count.to(torch.float64).numpy()


def _moved(
    target: Target, case: Case, inputs: Inputs, device: torch.device, longest: int | None
) -> Iterator[tuple[str, Any, Array]]:
    """The operator on transformed input, brought back: (property, row or rows it speaks of, lam)."""
    dtype = getattr(torch, case.dtype)
    rng = np.random.default_rng(len(case.rows))

    def lam(changed: Inputs, as_case: Case = case) -> Array:
        found, _, _ = _call(target, as_case, changed, device, dtype, "contiguous", grad=False)
        return found.to("cpu", torch.float64).numpy()

    everything = slice(None)
    if len(case.rows) > 1:
        one = slice(len(case.rows) - 1, len(case.rows))
        s, valid, k, eps, g = inputs
        alone = lam(Inputs(s[one], valid[one], k[one], eps[one], g[one]), replace(case, rows=case.rows[one]))
        yield "row alone", one, alone
    order = rng.permutation(case.n)
    back = np.argsort(order)
    yield "permutation", everything, lam(inputs._replace(s=inputs.s[:, order], valid=inputs.valid[:, order]))[:, back]
    if longest is None or case.n + 3 <= longest:
        tail = np.full((len(case.rows), 3), 1e4)
        longer = inputs._replace(s=np.hstack([inputs.s, tail]), valid=np.hstack([inputs.valid, np.zeros(tail.shape, bool)]))
        yield "masked tail", everything, lam(longer)[:, : case.n]
    with np.errstate(over="ignore"):
        doubled = inputs._replace(s=2.0 * inputs.s, eps=2.0 * inputs.eps)
    # a power of two is exact where nothing leaves the range of the dtype
    limit = torch.finfo(dtype)
    size = np.abs(doubled.s[np.isfinite(inputs.s) & (inputs.s != 0)])
    if (size <= limit.max).all() and (size >= 4 * limit.tiny).all():
        first = None if case.eps_init is None else 2.0 * case.eps_init
        yield "scale", everything, lam(doubled, replace(case, eps=2.0 * case.eps, eps_init=first))


# --- one configuration of the autotuner ------------------------------------------------------------------------------


PROOF_ELEMENTS = 1 << 20
"""Entries of a batch of a proof, at most."""


def proof_cases(op: str, dtype: str, n: int, seed: int) -> list[Case]:
    """The cases on which a launch configuration for rows of ``n`` scores is proved.

    Lengths n, and n - 3 with a mask and tensors for k and eps; every family where the batch has room for it. The batch has as
    many rows as there are families, or fewer where rows are very long.
    """
    names = list(families.FAMILIES)
    plain = [name for name in names if families.FAMILIES[name].regular and name not in ("ragged mask", "holes")]
    room = max(2, min(len(names), PROOF_ELEMENTS // max(n, 1)))
    schedule: dict[str, Any] = {"eps": 0.1}
    if op == "coordinate_descent":
        schedule = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "n_iters": 20}

    def chosen(pool: list[str]) -> tuple[tuple[str, int], ...]:
        return tuple((pool[i % len(pool)], seed + i) for i in range(room))

    exact = op == "soft_topk"
    return [
        Case(op, dtype, n, chosen(plain), tensor_k=False, **schedule),
        Case(op, dtype, max(1, n - 3), chosen(names), tensor_k=True, tensor_eps=exact, **schedule),
    ]


def check_candidate(
    target: Target, op: str, *, device: torch.device | str, dtype: torch.dtype, n: int, seed: int = 0
) -> dict[str, Any]:
    """Proves one launch configuration: values and gradients of the cases of :func:`proof_cases`.

    Args:
        target: the operator launched with that configuration.
        op: "soft_topk" or "coordinate_descent".
        device: where it runs.
        dtype: of the scores.
        n: the length of rows that the configuration is for.
        seed: of the inputs.

    Returns:
        ``{"ok", "reason", "cases" (rows compared), "families", "max_error": {"value", "grad_scores", "grad_k"},
        "bound": likewise, at the same row, "replays_bitwise", "seed"}``.
    """
    names = {"values": "value", "grad scores": "grad_scores", "grad k": "grad_k"}
    worst: dict[str, tuple[float, float, float]] = {}
    cases = 0
    used: set[str] = set()
    failure = ""
    replays = True
    for case in proof_cases(op, str(dtype).removeprefix("torch."), n, seed):
        cases += len(case.rows)
        used |= {family for family, _ in case.rows}
        for finding in examine(target, case, device, longest=n):
            if not finding.holds and not failure:
                failure = f"{finding.to_text()} (n = {case.n}, family {case.rows[finding.worst][0]})"
            replays = replays and not (finding.name == "replays bitwise" and not finding.holds)
            if finding.name in names:
                at, ratio = finding.worst, float(finding.ratio[finding.worst])
                if ratio >= worst.get(finding.name, (-1.0, 0.0, 0.0))[0]:
                    worst[finding.name] = (ratio, float(finding.error[at]), float(finding.bound[at]))
    return {
        "ok": not failure,
        "reason": failure,
        "cases": cases,
        "families": sorted(used),
        "max_error": {short: worst[name][1] if name in worst else None for name, short in names.items()},
        "bound": {short: worst[name][2] if name in worst else None for name, short in names.items()},
        "replays_bitwise": replays,
        "seed": seed,
    }


# --- the suite -------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What was seen of one property, operator and dtype."""

    cases: int = 0
    left_out: int = 0
    ratio: float = -1.0
    error: float | None = None
    bound: float | None = None
    family: str | None = None

    def add(self, finding: Finding, case: Case) -> None:
        out = int(finding.left_out.sum())
        self.left_out += out
        self.cases += len(case.rows) - out
        at = finding.worst
        ratio = float(finding.ratio[at])
        if ratio > self.ratio and not finding.left_out[at]:
            self.ratio, self.error, self.bound = ratio, float(finding.error[at]), float(finding.bound[at])
            self.family = case.rows[at][0]

    @property
    def share(self) -> float:
        return self.left_out / max(self.left_out + self.cases, 1)


@dataclass
class _Failure:
    """The smallest counterexample so far."""

    case: Case
    finding: Finding

    def size(self) -> tuple[int, int]:
        return len(self.case.rows), self.case.n


class _Enough(BaseException):
    """Shrinking has taken long enough; not an Exception, so that hypothesis passes it on."""


def _sweep(op: str, dtype: str, most: int) -> list[Case]:
    """Every family at a few lengths: what no draw may leave out."""
    names = tuple((name, 1000 + i) for i, name in enumerate(families.FAMILIES))
    published: dict[str, Any] = {}
    if op == "coordinate_descent":
        published = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
    plan = ((1, "contiguous"), (33, "transposed"), (257, "strided"), (min(1000, most), "padded rows"))
    return [Case(op, dtype, n, names, tensor_eps=op == "soft_topk" and n != 33, layout=layout, **published) for n, layout in plan]


def strategy(op: str, dtype: str, most: int) -> Any:
    """A hypothesis strategy of cases; the simplest is one normal row of length 1."""
    from hypothesis import strategies as st

    row = st.tuples(st.sampled_from(list(families.FAMILIES)), st.integers(0, 1 << 16))
    schedules: Any = st.just({})
    if op == "coordinate_descent":
        schedules = st.sampled_from(
            [
                {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
                {"n_iters": 1, "eps": 0.1},
                {"n_iters": 5, "eps": 0.1},
                {"n_iters": 50, "eps": 0.1, "eps_init": 1.0, "eps_decay": 0.9},
                {"n_iters": 12, "eps": 0.5},
            ]
        )

    def build(
        n: int, rows: list[tuple[str, int]], eps: float, schedule: dict[str, Any], tensor_k: bool, tensor_eps: bool, layout: str
    ) -> Case:
        made = Case(op, dtype, n, tuple(rows), eps, tensor_k=tensor_k, tensor_eps=tensor_eps and op == "soft_topk", layout=layout)
        return replace(made, **schedule)

    return st.builds(
        build,
        st.sampled_from(families.lengths(most)),
        st.lists(row, min_size=1, max_size=16),
        st.sampled_from([0.1, 0.03, 0.5, 1.0, 1e-3, 1e-6]),
        schedules,
        st.booleans(),
        st.booleans(),
        st.sampled_from(families.LAYOUTS),
    )


def _explore(op: str, dtype: str, most: int, examples: int, seed: int, shrink: bool, test: Callable[[Case], None]) -> None:
    """Calls ``test`` on drawn cases; with ``shrink``, on ever smaller ones once it has raised."""
    import hypothesis
    from hypothesis import HealthCheck, Phase

    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(strategy(op, dtype, most))
    def drawn(case: Case) -> None:
        test(case)

    drawn()


class _Violation(Exception):
    """A property fails on a case."""


def _shrunk(target: Target, device: torch.device, first: _Failure, most: int, examples: int, seed: int, seconds: float) -> _Failure:
    """The smallest counterexample to one property that can be found in the time there is."""
    name, best, until = first.finding.name, first, time.monotonic() + seconds

    def fails(case: Case) -> bool:
        nonlocal best
        if time.monotonic() > until:
            raise _Enough
        finding = next((one for one in examine(target, case, device) if one.name == name and not one.holds), None)
        if finding is None:
            return False
        found = _Failure(case, finding)
        if found.size() <= best.size():
            best = found
        return True

    def test(case: Case) -> None:
        if fails(case):
            raise _Violation

    try:
        # the worst row alone is nearly always enough, else it and a neighbour; then ever shorter ones of its kind
        rows, at = first.case.rows, first.finding.worst
        for part in (rows[at : at + 1], rows[max(at - 1, 0) : at + 1], rows[at : at + 2]):
            if fails(replace(first.case, rows=part)):
                break
        for n in families.lengths(best.case.n)[:-1]:
            if fails(replace(best.case, n=n)):
                break
        fails(replace(best.case, layout="contiguous"))
        fails(replace(best.case, tensor_eps=False))
        fails(replace(best.case, tensor_k=False))
        for family in ("normal", "uniform"):
            if fails(replace(best.case, rows=((family, 0),) * len(best.case.rows))):
                break
        _explore(first.case.op, first.case.dtype, most, examples, seed, True, test)
    except (_Violation, _Enough):
        pass
    return best


def _reproducer(name: str, where: str, case: Case, device: torch.device) -> str:
    module, _, attribute = where.partition(":")
    return "\n".join(
        (
            f"from {module} import {attribute}",
            "from coordroute.reference import verify",
            "",
            f"case = verify.{case!r}",
            f"for finding in verify.examine({attribute}, case, {str(device)!r}):",
            f"    if finding.name == {name!r}:",
            "        print(finding.to_text())",
            "print(verify.draw(case))  # the scores, what is valid, k, eps and the gradient of lam",
        )
    )


class _Part(NamedTuple):
    """One operator and dtype of a run."""

    op: str
    dtype: str
    where: str
    device: torch.device
    examples: int
    seed: int
    most: int

    @property
    def steps(self) -> int:
        return self.examples + len(_sweep(self.op, self.dtype, self.most))


class _Outcome(NamedTuple):
    properties: list[dict[str, Any]]
    failures: list[dict[str, Any]]


def _run_part(part: _Part, target: Target, say: Callable[[str, int], None]) -> _Outcome:
    """Sweeps, draws and shrinks; calls ``say`` with (what is done, steps done since)."""
    op, dtype = part.op, part.dtype
    tallies: dict[str, _Tally] = {}
    failures: dict[str, _Failure] = {}

    def note(case: Case) -> None:
        for finding in examine(target, case, part.device):
            tallies.setdefault(finding.name, _Tally()).add(finding, case)
            if not finding.holds:
                found = _Failure(case, finding)
                if finding.name not in failures or found.size() < failures[finding.name].size():
                    failures[finding.name] = found
        say(f"{op} {dtype}", 1)

    for case in _sweep(op, dtype, part.most):
        note(case)
    _explore(op, dtype, part.most, part.examples, part.seed, False, note)
    shrunk = []
    until = time.monotonic() + SHRINK_SECONDS_IN_ALL
    for name, first in failures.items():
        say(f"shrinking a counterexample to {name!r} of {op} {dtype}", 0)
        seconds = min(SHRINK_SECONDS, until - time.monotonic())
        smallest = _shrunk(target, part.device, first, part.most, part.examples, part.seed, seconds)
        shrunk.append(_failure(part, name, smallest))
    _judge.cache_clear()
    rows = [
        _property(part, name, tallies.get(name, _Tally()), failures.get(name)) for name, (_, ops) in PROPERTIES.items() if op in ops
    ]
    return _Outcome(rows, shrunk)


def _imported(where: str) -> Target:
    module, _, attribute = where.partition(":")
    found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    if not callable(found):
        raise TypeError(f"{where} is a {type(found).__name__}, which cannot be called")
    return found


def _serve(part: _Part, pipe: Any) -> None:
    """A part in a process of its own."""
    pipe.send(_run_part(part, _imported(part.where), lambda text, steps: pipe.send((text, steps))))
    pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first moment: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_processes(parts: list[_Part], workers: int, say: Callable[[str, int], None]) -> list[_Outcome]:
    """Runs parts side by side: on a GPU most of the time goes into compiling. A process that dies fails its own part."""
    context = multiprocessing.get_context("spawn")
    waiting = list(parts)
    running: dict[multiprocessing.connection.Connection[Any, Any], tuple[_Part, Any]] = {}
    outcomes: dict[_Part, _Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                part = waiting.pop(0)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(part, theirs), daemon=True)
                with _without_interrupts():
                    process.start()
                theirs.close()
                running[mine] = (part, process)
            ready = multiprocessing.connection.wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                part, process = running[pipe]
                try:
                    message = pipe.recv()
                except EOFError:
                    process.join()
                    outcomes.setdefault(part, _died(part, process.exitcode))
                    del running[pipe]
                    continue
                if isinstance(message, _Outcome):
                    outcomes[part] = message
                else:
                    say(*message)
    finally:
        for _, process in running.values():
            process.kill()
    return [outcomes[part] for part in parts]


def _died(part: _Part, status: int | None) -> _Outcome:
    message = f"{part.op} {part.dtype}: the process that ran it ended with exit status {status} before it was done"
    rows = [_property(part, name, _Tally(), None) for name, (_, ops) in PROPERTIES.items() if part.op in ops]
    for row in rows:
        if row["property"] == "runs":
            row["verdict"], row["reason"] = "fail", message
    failure = {"op": part.op, "property": "runs", "dtype": part.dtype, "family": None, "error": None, "bound": None}
    return _Outcome(rows, [failure | {"message": message, "reproducer": ""}])


def default_workers(device: torch.device) -> int:
    """Processes to run on: all cores but two, at most 8, on a GPU; this one on a CPU, whose kernels use all cores."""
    return min(8, max(1, (os.cpu_count() or 2) - 2)) if device.type == "cuda" else 1


def run(
    targets: dict[str, Target],
    *,
    device: torch.device | str | None = None,
    examples: int = 25,
    seed: int = 0,
    progress: Progress | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    longest: int | None = None,
    where: dict[str, str] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Runs the whole suite.

    Args:
        targets: operator ("soft_topk", "coordinate_descent") -> the implementation to be judged.
        device: where; None is the current GPU where there is one, else the CPU.
        examples: batches that hypothesis draws for each operator and dtype, on top of a fixed sweep over every family.
        seed: of all draws; the same seed draws the same cases.
        progress: called with (total, done, text, seconds left or None).
        dtypes: of the scores.
        longest: the longest rows drawn; None is 16385 on a GPU and 2049 on a CPU.
        where: operator -> "module:function", where processes import the implementations from, and the code that reproduces a
            failure. None: they are in this process only, and so is the run; the code then names coordroute's own.
        workers: processes, each running one operator and dtype at a time; None is :func:`default_workers`, 1 is this one.

    Returns:
        ``{"seed", "examples", "seconds", "ok", "properties": [...], "failures": [...]}``; a row of properties is ``{"op",
        "property", "sentence", "dtype", "cases", "left_out", "worst_error", "bound", "worst_ratio", "worst_family", "verdict",
        "reason"}``, one of failures ``{"op", "property", "dtype", "family", "error", "bound", "message", "reproducer"}``.

    Raises:
        ValueError: an unknown operator, no target, examples below 1.
    """
    if not targets or any(op not in KINDS for op in targets):
        raise ValueError(f"targets has {', '.join(map(repr, targets)) or 'nothing'}; allowed are {' and '.join(KINDS)}")
    if examples < 1:
        raise ValueError(f"examples is {examples}; at least 1 is needed")
    begin = time.monotonic()
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    most = longest or (16385 if at.type == "cuda" else 2049)
    named = where or {op: f"coordroute:{op}" for op in targets}
    parts = [_Part(op, dtype, named[op], at, examples, seed, most) for op in KINDS if op in targets for dtype in dtypes]
    if workers is None:
        workers = default_workers(at) if where else 1
    total = sum(part.steps for part in parts)
    done = 0

    def say(text: str, steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            spent = time.monotonic() - begin
            left = spent / done * (total - done) if 3 <= done < total else None
            progress(total, min(done, total), text, left)

    alone = workers <= 1
    outcomes = [_run_part(part, targets[part.op], say) for part in parts] if alone else _in_processes(parts, workers, say)
    rows = [row for outcome in outcomes for row in outcome.properties]
    return {
        "seed": seed,
        "examples": examples,
        "seconds": round(time.monotonic() - begin, 1),
        "ok": all(row["verdict"] != "fail" for row in rows),
        "properties": rows,
        "failures": [failure for outcome in outcomes for failure in outcome.failures],
    }


def _failure(part: _Part, name: str, found: _Failure) -> dict[str, Any]:
    case, finding, at = found.case, found.finding, found.finding.worst
    size = f"{len(case.rows)} row(s) of {case.n}"
    return {
        "op": part.op,
        "property": name,
        "dtype": case.dtype,
        "family": case.rows[at][0],
        "error": _number(float(finding.error[at])),
        "bound": _number(float(finding.bound[at])),
        "message": f"{part.op} {case.dtype}, {size}: {finding.to_text()} (family {case.rows[at][0]!r})",
        "reproducer": _reproducer(name, part.where, case, part.device),
    }


def _number(value: float | None) -> float | None:
    """None where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def _property(part: _Part, name: str, tally: _Tally, failure: _Failure | None) -> dict[str, Any]:
    verdict, reason = "pass", ""
    if failure is not None:
        verdict, reason = "fail", failure.finding.message
    elif tally.share > compare.KINK_SHARE:
        verdict = "fail"
        reason = f"{tally.share:.0%} of the rows lie at a kink and were left out; at most {compare.KINK_SHARE:.0%} may"
    elif not tally.cases:
        verdict, reason = "not run", "no case came to it"
    return {
        "op": part.op,
        "property": name,
        "sentence": PROPERTIES[name][0],
        "dtype": part.dtype,
        "cases": tally.cases,
        "left_out": tally.left_out,
        "worst_error": _number(tally.error),
        "bound": _number(tally.bound),
        "worst_ratio": _number(max(tally.ratio, 0.0)) if tally.cases else None,
        "worst_family": tally.family,
        "verdict": verdict,
        "reason": reason,
    }
