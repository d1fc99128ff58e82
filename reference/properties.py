"""The properties of an operator, each measured on a case: a name, a plain sentence, and a bound with its derivation.

:func:`examine` runs one :class:`cases.Case` on an implementation and measures every property of every row. An implementation is
called as

    soft_topk(scores, k, eps=..., mask=...)
    coordinate_descent(scores, k, n_iters=..., eps=..., eps_init=..., eps_decay=..., mask=..., checkpoint_segments=...)
    relaxed_topk(scores, k, mask=...)

with scores [R, n], k a number or a tensor [R], eps of soft_topk likewise, and mask bool [R, n] (True = valid), which is only
passed where a row has an entry that does not count. It returns lam [R, n] and is differentiable. ``mask`` and
``checkpoint_segments`` may be left out of its signature; what needs them is then not run.

Bounds. The error of a row is the norm of (found - truth). It may be twice the error of plain torch in the working precision on the
same input, plus the oracle's running error bound, plus what storing the answer costs (:mod:`compare`), plus, of a gradient, what
underflow may cost (:func:`_underflow`). ``B`` below stands for that bound; u is the roundoff of the working precision. Where a
transformed call is compared with the first, both have their own B.

A ``relaxed_topk`` has no oracle here. Its truth is its own float64 run, and the running error bound is 16 times what that run
moves by when scores and k are changed by one roundoff: that of an answer that is exact for inputs a few roundings away (backward
stability; Higham, Accuracy and Stability of Numerical Algorithms, section 1.5).

Nothing here imports a kernel.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.gradcheck import GradcheckError

from . import compare, families, oracles
from .cases import KINDS, PUBLISHED, Case, Inputs, draw, rounded
from .certificate import Certificate, certify
from .oracles import Array, Truth

Target = Callable[..., torch.Tensor]

SLACK_SHARE, TERMS = 0.1, 16.0
"""A row counts as left out of a gradient comparison where its kinks alone may move the gradient by more than this share of it,
or of the terms of which it is the sum: at a small eps they may all but cancel. The oracle's running error is some 16 roundings
of each term."""
CERTIFIED = 1e-6
"""Entries of lam below it have no part in stationarity (see :func:`certificate.certify`)."""
EVERY = 16
"""One batch in so many is examined for the properties that need further oracles."""

EXACT = ("soft_topk",)
SOLVERS = ("soft_topk", "coordinate_descent")
OPTIMA = ("soft_topk", "relaxed_topk")
"""Operators that maximise s·lam plus a concave symmetric term: what theory says of one holds for all of them."""


@dataclass(frozen=True)
class Property:
    """What an operator has to hold to.

    Attributes:
        name: as it appears in tables.
        sentence: what it says, for a person.
        bound: how the bound is derived.
        kinds: the operators it holds for.
        measure: Trial -> findings; none where a case does not come to it.
        further: whether it needs oracles of further inputs, so that only one batch in ``EVERY`` is examined for it.
        execution: whether it says how it runs (streams, graphs), which one case for each dtype shows.
    """

    name: str
    sentence: str
    bound: str
    kinds: tuple[str, ...]
    measure: Callable[[Trial], Iterable[Finding]]
    further: bool = False
    execution: bool = False


@dataclass
class Finding:
    """One property measured on one case.

    Attributes:
        name: the property.
        error: [R].
        bound: [R]: the property holds for a row where error <= bound.
        left_out: [R], rows that were not compared.
        message: what happened, where a number does not say it.
        ulps, plain_ulps: [R], the error of the implementation and of plain torch in ulps of the dtype, in the norm of a row; of
            values and gradients only, NaN where the truth is 0.
    """

    name: str
    error: Array
    bound: Array
    left_out: families.BoolArray
    message: str = ""
    ulps: Array | None = field(default=None, repr=False)
    plain_ulps: Array | None = field(default=None, repr=False)

    @property
    def ratio(self) -> Array:
        """error / bound, [R]; 0 for rows that were left out, inf where anything but 0 is too much."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(self.error > 0, self.error / self.bound, 0.0)
        return np.where(self.left_out, 0.0, np.where(np.isnan(found) | np.isnan(self.error), np.inf, found))

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


def accepts(target: Target, name: str) -> bool:
    """Whether a callable takes a keyword argument; one whose signature cannot be read is said to."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


# --- calling ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a call returned, in float64; None for a gradient that was not asked for or does not exist."""

    lam: Array  # [R, n]
    grad_scores: Array  # [R, n]
    grad_k: Array | None  # [R]
    grad_eps: Array | None  # [R]


class Called(NamedTuple):
    """A call: tensors as they came, and every input beside a copy of all memory around it from before."""

    lam: torch.Tensor
    gradients: list[torch.Tensor | None]  # of scores, k and eps
    given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # input, all of its memory, a copy from before
    guards: list[torch.Tensor]


def _numpy(value: torch.Tensor | None) -> Array | None:
    return None if value is None else value.detach().to("cpu", torch.float64).numpy()


def arguments_of(
    target: Target, case: Case, inputs: Inputs, device: torch.device, dtype: torch.dtype, layout: str, grad: bool = True
) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """(scores, k, keyword arguments) of a call; the tensors that have a gradient require it."""
    compute = compare.compute_dtype(dtype)

    def tensor(values: Any, kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(kind).to(device)

    scores = families.laid_out(tensor(inputs.s, dtype), layout).detach().requires_grad_(grad)
    k: Any = float(inputs.k[0])
    if case.tensor_k:
        k = families.within(tensor(inputs.k, compute)).detach().requires_grad_(grad)
    extra: dict[str, Any] = dict(case.schedule())
    if case.op != "relaxed_topk":
        extra["eps"] = case.eps
        if case.tensor_eps:
            extra["eps"] = families.within(tensor(inputs.eps, compute)).detach().requires_grad_(grad)
    if not inputs.valid.all():
        extra["mask"] = families.laid_out(tensor(inputs.valid, torch.bool), layout)
    if case.segments is not None and accepts(target, "checkpoint_segments"):
        extra["checkpoint_segments"] = case.segments
    return scores, k, extra


def _memory(value: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor lies in, as one flat tensor."""
    count = value.untyped_storage().nbytes() // value.element_size()
    return torch.as_strided(value, (count,), (1,), 0)


def _grad_tensor(case: Case, g: Array, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of lam in the memory layout of the case."""
    values = torch.from_numpy(np.ascontiguousarray(g)).to(dtype).to(device)
    if case.grad == "expanded" and values.numel() and bool((values == values[0, 0]).all()):
        return values[:1, :1].contiguous().expand(values.shape)
    if case.grad in ("transposed", "strided"):
        return families.laid_out(values, case.grad)
    return families.within(values)


def call(
    target: Target,
    case: Case,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    grad: bool = True,
) -> Called:
    """Calls an implementation forward and, with ``grad``, backward."""
    scores, k, extra = arguments_of(target, case, inputs, device, dtype, layout, grad)
    tensors = [value for value in (scores, k, *extra.values()) if isinstance(value, torch.Tensor)]
    given = [(value.detach(), _memory(value.detach()), _memory(value.detach()).clone()) for value in tensors]
    guards = guarded(scores)
    lam = target(scores, k, **extra)
    if not isinstance(lam, torch.Tensor):
        raise TypeError(f"it returned a {type(lam).__name__}, not a tensor")
    if lam.shape != scores.shape or lam.dtype != dtype or lam.device != scores.device:
        raise TypeError(
            f"it returned {tuple(lam.shape)} {lam.dtype} on {lam.device} for {tuple(scores.shape)} {dtype} on {scores.device}"
        )
    gradients: list[torch.Tensor | None] = [None, None, None]
    if grad:
        g = _grad_tensor(case, inputs.g, device, dtype)
        guards += guarded(scores)
        gradients = backward(lam, (scores, k, extra.get("eps")), g)
    return Called(lam.detach(), gradients, given, guards)


def backward(lam: torch.Tensor, leaves: tuple[Any, ...], g: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of scores, k and eps; None for what is no tensor."""
    made = iter(torch.autograd.grad(lam, [value for value in leaves if isinstance(value, torch.Tensor)], g))
    return [next(made) if isinstance(value, torch.Tensor) else None for value in leaves]


def guarded(like: torch.Tensor, holes: int = 3) -> list[torch.Tensor]:
    """Blocks of NaN with holes of the size of ``like`` between them, where the next allocations of that size are likely to lie.

    What an operator allocates there holds NaN before it is written; what it writes beyond its end lands in a block.
    """
    blocks = [torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device) for _ in range(2 * holes + 1)]
    return blocks[::2]


def bits(value: torch.Tensor) -> torch.Tensor:
    """A tensor's bits, as integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(kinds[value.element_size()])


def answer_of(called: Called) -> Answer:
    values = _numpy(called.lam)
    scores, k, eps = (_numpy(gradient) for gradient in called.gradients)
    if values is None or scores is None:
        raise TypeError("there is no gradient of the scores")
    return Answer(values, scores, k, eps)


# --- the truth of a case ---------------------------------------------------------------------------------------------


class Plain(NamedTuple):
    """Errors of plain torch in the working precision, each [R], and in ulps of the dtype once stored."""

    value: Array
    scores: Array
    k: Array
    eps: Array
    ulps: dict[str, Array]


class Judged(NamedTuple):
    """Inputs, truth and yardstick of a case, and the bounds that follow."""

    inputs: Inputs
    truth: Truth
    plain: Plain
    value_bound: Array  # [R]
    gradient_bounds: dict[str, tuple[Array, families.BoolArray]]  # name -> bound [R], rows left out [R]


def _clamped(case: Case, inputs: Inputs) -> Array:
    """k as the operator takes it: a tensor's values within the number of entries that count."""
    return np.minimum(inputs.k, inputs.counted().sum(axis=1)) if case.tensor_k else inputs.k


def truth_of(case: Case, inputs: Inputs, unit: float | None = None) -> Truth:
    """The float64 oracle's answer to a case of one of our operators; ``unit`` is the roundoff, None that of its dtype."""
    unit = unit or compare.roundoff(compare.compute_dtype(getattr(torch, case.dtype)))
    s, valid, k, eps, g = inputs
    if case.op == "soft_topk":
        return oracles.soft_topk_truth(s, k, eps, valid, g, unit)
    budget = _clamped(case, inputs)
    truth = oracles.coordinate_descent_truth(s, budget, eps=case.eps, mask=valid, g=g, unit=unit, **case.schedule())
    if case.tensor_k and truth.grad_k is not None:
        # k was clamped: there is nothing to differentiate beyond
        truth = replace(truth, grad_k=np.where(k > budget, 0.0 * truth.grad_k, truth.grad_k))
    return truth


def _own_truth(target: Target, case: Case, inputs: Inputs, device: torch.device) -> Truth:
    """A relaxed top-k's float64 run, and how far a roundoff of its inputs moves it."""
    unit = compare.roundoff(compare.compute_dtype(getattr(torch, case.dtype)))
    wide = replace(case, dtype="float64")
    rng = np.random.default_rng(len(case.rows))

    def run(given: Inputs) -> Answer:
        return answer_of(call(target, wide, given, device, torch.float64, "contiguous"))

    exact = run(inputs)
    none = np.zeros(len(inputs.k))
    moved = {"lam": none, "scores": none, "k": none}
    for _ in range(3):
        nudge = 1.0 + unit * rng.choice([-1.0, 1.0], inputs.s.shape)
        other = run(inputs._replace(s=inputs.s * nudge, k=inputs.k * (1.0 + unit * rng.choice([-1.0, 1.0], len(none)))))
        for name, one, two in (
            ("lam", exact.lam, other.lam),
            ("scores", exact.grad_scores, other.grad_scores),
            ("k", exact.grad_k, other.grad_k),
        ):
            if one is not None and two is not None:
                moved[name] = np.maximum(moved[name], compare.row_errors(one, two))
    size = _norm(exact.lam) + 1.0
    error = {name: 16.0 * value / unit + 16.0 * size for name, value in moved.items()}
    return Truth(
        exact.lam, none, exact.grad_scores, exact.grad_k, None,
        error["lam"], error["scores"] + _norm(inputs.g), error["k"] + _norm(inputs.g), none, none, none, none,
    )  # fmt: skip


def _plain_errors(case: Case, inputs: Inputs, truth: Truth) -> Plain:
    plain = oracles.soft_topk_torch if case.op == "soft_topk" else oracles.coordinate_descent_torch
    clamped = inputs._replace(k=_clamped(case, inputs))
    dtype = getattr(torch, case.dtype)
    compute = compare.compute_dtype(dtype)
    called = call(plain, replace(case, segments=None), clamped, torch.device("cpu"), compute, "contiguous")
    none = np.zeros(len(inputs.k))

    def error(found: torch.Tensor | None, wanted: Array | None) -> Array:
        return none if found is None or wanted is None else compare.row_errors(found.to(torch.float64).numpy(), wanted)

    scores, k, eps = called.gradients
    of_k = np.where(clamped.k < inputs.k, 0.0, error(k, truth.grad_k))  # a clamped k: exactly 0 is asked for
    stored = {
        "values": ulps(error(called.lam.to(dtype), truth.lam), truth.lam, dtype),
        "grad scores": none if scores is None else ulps(error(scores.to(dtype), truth.grad_scores), truth.grad_scores, dtype),
        "grad k": ulps(of_k, truth.grad_k, compute),
        "grad eps": ulps(error(eps, truth.grad_eps), truth.grad_eps, compute),
    }
    return Plain(error(called.lam, truth.lam), error(scores, truth.grad_scores), of_k, error(eps, truth.grad_eps), stored)


def ulps(error: Array, truth: Array | None, dtype: torch.dtype) -> Array:
    """The error of a row in ulps of its norm, [R]; NaN where the norm is below the normal range of the dtype."""
    if truth is None:
        return np.full(len(error), np.nan)
    size = _norm(truth) if truth.ndim > 1 else np.abs(truth)
    info = torch.finfo(dtype)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where(size > info.tiny / info.eps, error / (size * info.eps), np.nan)


def _judged(case: Case, inputs: Inputs, target: Target, device: torch.device) -> Judged:
    """``target`` and ``device`` are for a relaxed_topk, which is judged by its own float64 run."""
    if case.op in SOLVERS:
        return _judged_by_oracle(case, inputs)
    none = np.zeros(len(inputs.k))
    return _bounded(case, inputs, _own_truth(target, case, inputs, device), Plain(none, none, none, none, {}))


def _judged_by_oracle(case: Case, inputs: Inputs) -> Judged:
    truth = truth_of(case, inputs)
    return _bounded(case, inputs, truth, _plain_errors(case, inputs, truth))


def _bounded(case: Case, inputs: Inputs, truth: Truth, plain: Plain) -> Judged:
    dtype = getattr(torch, case.dtype)
    value_bound = compare.bound(plain.value, truth.error_lam, compare.storage_floor(truth.lam, dtype), dtype)
    bounds = {}
    compute = compare.compute_dtype(dtype)
    underflow = _underflow(case, inputs, truth, compute)
    for name, wanted, yardstick, error, slack, stored in (
        ("grad scores", truth.grad_scores, plain.scores, truth.error_scores, truth.slack_scores, dtype),
        ("grad k", truth.grad_k, plain.k, truth.error_k, truth.slack_k, compute),
        ("grad eps", truth.grad_eps, plain.eps, truth.error_eps, truth.slack_eps, compute),
    ):
        if wanted is None:
            continue
        size = np.abs(wanted) if wanted.ndim == 1 else _norm(wanted)
        scale = np.maximum(np.nan_to_num(size), error / TERMS)
        left_out = (slack > SLACK_SHARE * scale) & (slack > 0)
        limit = compare.bound(yardstick, error, compare.storage_floor(wanted, stored), dtype) + np.where(left_out, 0.0, slack)
        bounds[name] = (limit + underflow[name], left_out)
    return Judged(inputs, truth, plain, value_bound, bounds)


def _underflow(case: Case, inputs: Inputs, truth: Truth, compute: torch.dtype) -> dict[str, Array]:
    """What gradients may lose where a result lies below m, the smallest normal number of the working precision: up to m each.

    n entries count, and c of them have a g that is not 0.

    Of the exact solver it is every lam, product and sum, with M = ``truth.mass`` and A = sum |g| + n |gbar|:

    - sum lam g loses m |g| by a lam and m each by its product and its addition: m (sum |g| + 2 c).
    - M itself loses m by a lam: m n, and so gbar a share n m / M of it.
    - dk = gbar = sum lam g / M: E/M with E = m (A + 2 c), and m by the quotient. M may be small: what a budget leaves beside
      saturated entries.
    - ds_i = lam_i (g_i - gbar)/eps loses m |g_i - gbar|/eps by lam_i, m/eps by the product, m by the second product, and
      lam_i/eps times what gbar and g_i - gbar lose, E/M + 2 m, where the lam add up to M: m (A + n)/eps + m n + (E + 2 m M)/eps.
    - deps = -sum d_i ds_i/eps, where |d_i| <= eps log(1/m), since lam_i is 0 beyond: log(1/m) times the above, and for every
      entry m each by the product and the addition, over eps; and m by the quotient.

    Of coordinate descent it is every exponential and product, with G = sum |g|/eps_T, T iterations and ``truth.reach``:

    - exp((s - c)/eps_T), which all iterations at eps_T may share, c being any of their thresholds: lam loses m times the reach.
    - A_T, the sum of the gradients at lam: m (2 reach G + n). An iteration hands on the clamped share of it, which is at most 1,
      and loses m by a product: L = m (2 reach G + n + T) covers A_t for all t.
    - dk = sum eps_t A_{t+1} / k: (L sum eps_t + m T)/k.
    - ds_i adds up A_{t+1} p_i over t, where |A_{t+1}| <= G, and p_i is at most 1 and a multiple of the shared exponential by at
      most reach/k: L (1 + T) in the norm of a row, and m (1 + reach G max(1, 1/k)) for each of its entries and iterations.
    """
    tiny = torch.finfo(compute).tiny
    counted = inputs.counted()
    n = counted.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        eps = np.where(inputs.eps > 0, inputs.eps, 1.0)
        size = np.where(counted, np.abs(inputs.g), 0.0).sum(axis=1)
        if case.op != "coordinate_descent":
            mass, some = np.asarray(truth.mass), (counted & (inputs.g != 0)).sum(axis=1)
            gbar = np.zeros_like(eps) if truth.grad_k is None else np.abs(np.nan_to_num(truth.grad_k))
            weights = size + n * gbar
            handed = weights + 2.0 * some
            of_scores = (weights + n + handed + 2.0 * np.where(np.isfinite(mass), mass, 0.0)) / eps + n
            of_eps = -np.log(tiny) * of_scores + 2.0 * n / eps + 1.0
            return {"grad scores": tiny * of_scores, "grad k": tiny * (handed / mass + 1.0), "grad eps": tiny * of_eps}
        schedule = oracles.eps_schedule(case.n_iters, case.eps, case.eps_init, case.eps_decay)
        steps, k = case.n_iters, np.where(inputs.k > 0, inputs.k, np.inf)
        weights = np.asarray(truth.reach) * size / schedule[-1]
        handed = tiny * (2.0 * weights + n + steps)
        of_entries = tiny * steps * np.sqrt(n) * (1.0 + weights * np.maximum(1.0, 1.0 / k))
        of_k = (handed * sum(schedule[:-1]) + tiny * steps) / k
        return {"grad scores": handed * (1.0 + steps) + of_entries, "grad k": of_k, "grad eps": np.zeros_like(eps)}


@functools.lru_cache(maxsize=64)
def judge(case: Case) -> Judged:
    """Inputs, truth and bounds of a case of our operators; kept, since the candidates of a search are judged on the same cases."""
    return _judged_by_oracle(case, draw(case))


def _norm(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.sqrt(np.sum(x * x, axis=-1))


# --- a case on an implementation -------------------------------------------------------------------------------------


class Trial:
    """One case on one implementation: the first call, its truth, and what the properties need of further calls."""

    def __init__(self, target: Target, case: Case, device: torch.device, longest: int | None) -> None:
        self.target, self.case, self.device, self.longest = target, case, device, longest
        self.dtype = getattr(torch, case.dtype)
        self.unit = compare.roundoff(compare.compute_dtype(self.dtype))
        self.judged = judge(case) if case.op in SOLVERS else _judged(case, draw(case), target, device)
        self.inputs, self.truth = self.judged.inputs, self.judged.truth
        self.none, self.nobody = np.zeros(len(case.rows)), np.zeros(len(case.rows), bool)
        self.first = call(target, case, self.inputs, device, self.dtype, case.layout)
        self.answer = answer_of(self.first)
        self.rows = oracles.rows_of(self.inputs.s, self.inputs.k, self.inputs.eps, self.inputs.valid)
        self.regular = self.inputs.regular()

    @functools.cached_property
    def certificate(self) -> Certificate:
        """Of lam, from the scores alone."""
        return certify(self.inputs.s, self.answer.lam, self.inputs.k, self.inputs.eps, self.inputs.valid)

    @functools.cached_property
    def entries(self) -> Entries:
        """What rounding may do to the entries of lam."""
        return _entries(self)

    def lam(self, inputs: Inputs, case: Case | None = None) -> Array:
        """lam of other input, without gradients; [R, n]."""
        called = call(self.target, case or self.case, inputs, self.device, self.dtype, "contiguous", grad=False)
        return called.lam.to("cpu", torch.float64).numpy()

    def also(self, inputs: Inputs, case: Case | None = None) -> tuple[Answer, Judged]:
        """The answer to other input, with its own truth and bounds."""
        case = case or self.case
        judged = _judged(case, inputs, self.target, self.device)
        return answer_of(call(self.target, case, inputs, self.device, self.dtype, "contiguous")), judged

    def finding(self, name: str, error: Array, bound: Array, left_out: families.BoolArray | None = None) -> Finding:
        return Finding(name, error, bound, self.nobody if left_out is None else left_out)

    def some(self, name: str, rows: families.BoolArray, error: Array, bound: Array) -> Iterator[Finding]:
        """A finding of the rows that a property speaks of; none if there is none."""
        if rows.any():
            yield self.finding(name, np.where(rows, error, 0.0), np.where(rows, bound, np.inf))


def examine(
    target: Target,
    case: Case,
    device: torch.device | str = "cpu",
    longest: int | None = None,
    only: Iterable[str] | None = None,
) -> list[Finding]:
    """Measures the properties of every row of a case.

    Args:
        target: the implementation, called as the module says.
        case: what to run it on.
        device: where.
        longest: the longest rows that the implementation takes; None is any. "masked tail" makes rows of n + 3.
        only: names of the properties to measure; None is all but those of how it runs.

    Returns:
        The findings. An implementation that raises has one: "runs".
    """
    none, nobody = np.zeros(len(case.rows)), np.zeros(len(case.rows), bool)

    def raised(name: str, error: Exception) -> Finding:
        text = f"it raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding(name, none + np.inf, none, nobody, text)

    try:
        trial = Trial(target, case, torch.device(device), longest)
    except Exception as error:
        return [raised("runs", error)]
    wanted = None if only is None else set(only)
    findings: list[Finding] = [Finding("runs", none, none, nobody)]
    for one in PROPERTIES.values():
        if case.op not in one.kinds or (one.execution if wanted is None else one.name not in wanted):
            continue
        try:
            findings += one.measure(trial)
        except Exception as error:
            findings.append(raised(one.name, error))
    return findings


PROPERTIES: dict[str, Property] = {}
"""What is checked: name -> property."""


def _property(
    name: str, sentence: str, bound: str, kinds: tuple[str, ...] = KINDS, further: bool = False, execution: bool = False
) -> Callable[[Any], Any]:
    def register(measure: Callable[[Trial], Iterable[Finding]]) -> Callable[[Trial], Iterable[Finding]]:
        PROPERTIES[name] = Property(name, sentence, bound, kinds, measure, further, execution)
        return measure

    return register


@_property(
    "runs",
    "it returns a tensor of the scores' shape, dtype and device, and gradients, without an error",
    "none: it does or it does not",
)
def _runs(trial: Trial) -> Iterable[Finding]:
    return ()  # a Trial that exists has run


@_property("values", "lam is the float64 oracle's", "B of lam")
def _values(trial: Trial) -> Iterable[Finding]:
    error = compare.row_errors(trial.answer.lam, trial.truth.lam)
    found = trial.finding("values", error, trial.judged.value_bound)
    found.ulps = ulps(error, trial.truth.lam, trial.dtype)
    found.plain_ulps = trial.judged.plain.ulps.get("values")
    return [found]


def _gradient(name: str, which: str) -> Callable[[Trial], Iterable[Finding]]:
    def measure(trial: Trial) -> Iterable[Finding]:
        mine, wanted = getattr(trial.answer, which), getattr(trial.truth, which)
        if mine is None or wanted is None or name not in trial.judged.gradient_bounds:
            return
        limit, left_out = trial.judged.gradient_bounds[name]
        stored = trial.dtype if which == "grad_scores" else compare.compute_dtype(trial.dtype)
        error = compare.row_errors(mine, wanted, stored)
        found = trial.finding(name, error, limit, left_out)
        found.ulps, found.plain_ulps = ulps(error, wanted, stored), trial.judged.plain.ulps.get(name)
        yield found

    return measure


_KINK = "; plus the jump of what lies so near a threshold that rounding decides (a kink), or the row is left out"
_property("grad scores", "the gradient of the scores is the float64 oracle's", "B of the gradient" + _KINK)(
    _gradient("grad scores", "grad_scores")
)
_property("grad k", "the gradient of a tensor k is the float64 oracle's", "B of the gradient" + _KINK)(
    _gradient("grad k", "grad_k")
)
_property("grad eps", "the gradient of a tensor eps is the float64 oracle's", "B of the gradient" + _KINK, EXACT)(
    _gradient("grad eps", "grad_eps")
)


# --- feasibility and optimality, from the scores and the answer alone ------------------------------------------------


class Entries(NamedTuple):
    """What rounding may do to the entries of an answer."""

    lam: Array
    free: families.BoolArray  # 0 < lam < 1
    z: Array  # |log lam| where free, else 0
    relative: Array  # error of an entry relative to it
    mean: Array  # [R], that of the threshold: their mean weighted by lam
    rounded: families.BoolArray  # saturated, or rounded to it
    smallest: float


def _smallest(dtype: torch.dtype) -> float:
    """The least number that is stored: half precision keeps subnormal ones, which kernels in the wider types flush to 0."""
    stored = torch.finfo(dtype)
    return stored.tiny * (1.0 if dtype in (torch.float32, torch.float64) else stored.eps)


def _entries(trial: Trial) -> Entries:
    rows, stored, unit = trial.rows, torch.finfo(trial.dtype), trial.unit
    smallest = _smallest(trial.dtype)
    lam = np.nan_to_num(trial.answer.lam)
    free = (lam > 0) & (lam < 1) & np.isfinite(rows.s)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(free, np.abs(np.log(np.where(free, lam, 1.0))), 0.0)
        # exp and its argument, the threshold, storage, and what lies below the normal range
        relative = np.where(free, unit * (16.0 + 3.0 * z) + stored.eps / 2 + smallest / np.where(free, lam, 1.0), 0.0)
    resolved = free & (lam >= CERTIFIED)
    mass = np.where(resolved, lam, 0.0).sum(axis=1)
    mean = np.where(mass > 0, np.where(resolved, lam * relative, 0.0).sum(axis=1) / np.where(mass > 0, mass, 1.0), 0.0)
    # storing rounds to 1 what is a little below it: the lowest of the saturated, to within that
    ones = (lam >= 1) & np.isfinite(rows.s)
    lowest = np.where(ones, rows.s, np.inf).min(axis=1, initial=np.inf)
    with np.errstate(invalid="ignore"):
        near = ones & (rows.s <= (lowest + stored.eps * np.where(rows.nan, 1.0, rows.eps))[:, None])
    return Entries(lam, free, z, relative, mean, near, smallest)


def _known(trial: Trial, values: Array) -> Array:
    """0 in rows that must be NaN; a NaN elsewhere is a failure."""
    return np.where(trial.rows.nan, 0.0, np.where(np.isnan(values), np.inf, values))


@_property("box", "0 <= lam <= 1, and 0 where masked", "0: exact")
def _box(trial: Trial) -> Iterable[Finding]:
    found = trial.certificate
    return [trial.finding("box", _known(trial, found.box), trial.none)]


@_property(
    "budget",
    "sum lam = k",
    "the sum of what rounding may do to the entries: u (16 + 3 |log lam|) and storage each, and u for the threshold",
    OPTIMA,
)
def _budget(trial: Trial) -> Iterable[Finding]:
    if trial.case.op == "relaxed_topk":
        # an entry is stored, and the answer is that of a k a few roundings away
        stored = torch.finfo(trial.dtype).eps
        total = np.nan_to_num(trial.answer.lam).sum(axis=1)
        wanted = np.minimum(trial.inputs.k, trial.inputs.counted().sum(axis=1))
        rows = trial.regular
        error = np.abs(trial.answer.lam.sum(axis=1) - wanted)
        return trial.some("budget", rows, error, total * (stored / 2 + 16.0 * trial.unit) + trial.judged.value_bound)
    found = trial.certificate
    entries = trial.entries
    stored = torch.finfo(trial.dtype).eps
    lost = np.where(entries.rounded, stored / 2, np.where(entries.free, 0.0, entries.smallest) * trial.rows.valid).sum(axis=1)
    total = entries.lam.sum(axis=1)
    summing = 2.0**-53 * total * (2.0 + math.log2(max(trial.case.n, 1)))  # of the certificate itself, pairwise in float64
    # where all is saturated nothing can be steered, and k is met to its own rounding
    steered = np.where(entries.free, entries.lam, 0.0).sum(axis=1) > trial.unit * (16.0 + total)
    of_k = trial.unit * np.where(steered, np.minimum(total, 1.0), 16.0 + total)
    limit = (entries.lam * entries.relative).sum(axis=1) + lost + of_k + summing
    return [trial.finding("budget", _known(trial, found.budget), limit)]


def _slope(trial: Trial) -> Array:
    entries = trial.entries
    resolved = entries.free & (entries.lam >= CERTIFIED)
    most = np.where(resolved, entries.relative, 0.0).max(axis=1, initial=0.0)
    # lam = 1 is also what rounding makes of an entry a little below it; float64 itself rounds s and tau
    return most + entries.mean + torch.finfo(trial.dtype).eps + 16.0 * trial.unit + _own_rounding(trial)


def _own_rounding(trial: Trial) -> Array:
    """Of s - eps log lam and of their mean, in float64, in units of eps: a sum adds up to 16 terms one after the other."""
    rows = trial.rows
    scores = np.where(np.isfinite(rows.s), np.abs(rows.s), 0.0).max(axis=1, initial=0.0)
    return 2.0**-49 * (scores / np.where(rows.nan, 1.0, rows.eps) + trial.entries.z.max(axis=1, initial=0.0))


@_property(
    "stationarity",
    "s - eps log lam is one number where 0 < lam < 1, not above s where lam = 1",
    "the largest relative error of an entry, and that of the threshold",
    EXACT,
)
def _stationarity(trial: Trial) -> Iterable[Finding]:
    found = trial.certificate
    return [trial.finding("stationarity", _known(trial, found.stationarity), _slope(trial))]


@_property(
    "duality gap",
    "the dual value equals the primal one",
    "second order: eps lam d² for a relative error d of an entry, and what lies below the normal range",
    EXACT,
)
def _duality_gap(trial: Trial) -> Iterable[Finding]:
    found = trial.certificate
    entries, rows = trial.entries, trial.rows
    budget = np.maximum(rows.k, 1e-300)
    lost = rows.valid.sum(axis=1) * (entries.smallest + CERTIFIED * 2.0**-40)
    with np.errstate(divide="ignore", invalid="ignore"):
        square = np.where(entries.free, entries.lam * (entries.relative + entries.mean[:, None]) ** 2, 0.0).sum(axis=1)
        edge = entries.rounded.sum(axis=1) * _slope(trial) ** 2
        limit = (square + lost + edge + _own_rounding(trial) * rows.valid.sum(axis=1)) / budget + 2.0**-40
    return [trial.finding("duality gap", np.abs(_known(trial, found.duality_gap)), limit)]


@_property(
    "order",
    "a higher score never has a smaller weight, and equal scores have equal weights",
    "two evaluations of exp: relative 2 (u (16 + 4 |log lam|) + half an ulp of the dtype)",
)
def _order(trial: Trial) -> Iterable[Finding]:
    inputs, lam, info = trial.inputs, trial.answer.lam, torch.finfo(trial.dtype)
    rows = trial.regular & ~np.isnan(inputs.k)
    s = np.where(inputs.valid, inputs.s, -np.inf)
    # best score first; among equals the smallest weight first, so that a difference shows
    order = np.lexsort((lam, -s), axis=1)
    sorted_lam = np.take_along_axis(np.nan_to_num(lam, nan=np.inf), order, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = sorted_lam - np.minimum.accumulate(sorted_lam, axis=1)
        z = np.where(sorted_lam > 0, np.abs(np.log(sorted_lam)), 0.0)
        allowed = 2.0 * (sorted_lam * (trial.unit * (16.0 + 4.0 * z) + info.eps / 2) + _smallest(trial.dtype))
        worst = np.argmax(np.where(np.isfinite(excess), excess / allowed, np.inf), axis=1)
    at = np.arange(len(worst))
    return trial.some("order", rows, np.nan_to_num(excess[at, worst], nan=np.inf), allowed[at, worst])


# --- the same again --------------------------------------------------------------------------------------------------


@_property("replays bitwise", "the same call twice gives the same bits, values and gradients", "0: exact")
def _replays(trial: Trial) -> Iterable[Finding]:
    case = trial.case
    again = call(trial.target, case, trial.inputs, trial.device, trial.dtype, case.layout)
    return [trial.finding("replays bitwise", differing(trial.first, again), trial.none)]


def differing(one: Called, two: Called) -> Array:
    """The number of entries of every row whose bits differ, [R]."""
    rows = one.lam.shape[0]
    count = torch.zeros(rows, dtype=torch.int64)
    for a, b in ((one.lam, two.lam), *zip(one.gradients, two.gradients, strict=True)):
        if a is not None and b is not None:
            count += (bits(a) != bits(b)).reshape(rows, -1).sum(dim=1).cpu()
    return count.to(torch.float64).numpy()


@_property("inputs untouched", "no input is written to, nor the memory beside and between its entries", "0: exact")
def _untouched(trial: Trial) -> Iterable[Finding]:
    rows = len(trial.case.rows)
    count = torch.zeros(rows, dtype=torch.int64)
    for value, memory, before in trial.first.given:
        changed = bits(memory) != bits(before)
        if changed.any():
            inside = torch.as_strided(changed, value.shape, value.stride(), value.storage_offset()).reshape(rows, -1).sum(dim=1)
            count += inside.cpu()
            count[0] += int(changed.sum() - inside.sum())
    return [trial.finding("inputs untouched", count.to(torch.float64).numpy(), trial.none)]


@_property("guard bands", "memory before and behind the outputs is not written to", "0: exact")
def _guards(trial: Trial) -> Iterable[Finding]:
    error = trial.none.copy()
    for block in trial.first.guards:
        error[0] += float((~block.isnan()).sum())
    return [trial.finding("guard bands", error, trial.none)]


# --- transformed input -----------------------------------------------------------------------------------------------

_BOTH = "2 B: both are within B of the same truth"


def _moved(trial: Trial, name: str, lam: Array, rows: slice = slice(None)) -> Iterable[Finding]:
    error = trial.none.copy()
    error[rows] = compare.row_errors(lam, trial.answer.lam[rows])
    return [trial.finding(name, error, 2.0 * trial.judged.value_bound)]


@_property("row alone", "a row does not depend on the rows beside it", _BOTH)
def _alone(trial: Trial) -> Iterable[Finding]:
    case = trial.case
    if len(case.rows) == 1:
        return ()
    s, valid, k, eps, g = trial.inputs
    # the last one, or the last that needs the mask of the others: alone it is launched as they are
    row = max(np.flatnonzero(~valid.all(1)), default=len(case.rows) - 1)
    one = slice(row, row + 1)
    lam = trial.lam(Inputs(s[one], valid[one], k[one], eps[one], g[one]), replace(case, rows=case.rows[one]))
    return _moved(trial, "row alone", lam, one)


@_property("permutation", "permuted scores give permuted weights", _BOTH)
def _permutation(trial: Trial) -> Iterable[Finding]:
    order = np.random.default_rng(len(trial.case.rows)).permutation(trial.case.n)
    lam = trial.lam(trial.inputs._replace(s=trial.inputs.s[:, order], valid=trial.inputs.valid[:, order]))
    return _moved(trial, "permutation", lam[:, np.argsort(order)])


@_property("masked tail", "appended masked entries change nothing", _BOTH)
def _tail(trial: Trial) -> Iterable[Finding]:
    n, inputs = trial.case.n, trial.inputs
    if (trial.longest is not None and n + 3 > trial.longest) or not accepts(trial.target, "mask"):
        return ()
    tail = np.full((len(inputs.k), 3), 1e4)
    hidden = np.zeros(tail.shape, bool)
    longer = inputs._replace(s=np.hstack([inputs.s, tail]), valid=np.hstack([inputs.valid, hidden]))
    return _moved(trial, "masked tail", trial.lam(longer)[:, :n])


@_property("scale", "lam(2 s, 2 eps) = lam(s, eps)", _BOTH, SOLVERS)
def _scale(trial: Trial) -> Iterable[Finding]:
    inputs, case, limit = trial.inputs, trial.case, torch.finfo(trial.dtype)
    with np.errstate(over="ignore"):
        doubled = inputs._replace(s=2.0 * inputs.s, eps=2.0 * inputs.eps)
    # a power of two is exact where nothing leaves the range of the dtype
    size = np.abs(doubled.s[np.isfinite(inputs.s) & (inputs.s != 0)])
    if (size > limit.max).any() or (size < 4 * limit.tiny).any():
        return ()
    first = None if case.eps_init is None else 2.0 * case.eps_init
    return _moved(trial, "scale", trial.lam(doubled, replace(case, eps=2.0 * case.eps, eps_init=first)))


@_property(
    "shift",
    "lam(s + c) = lam(s)",
    "B of each: scores and c lie on a grid on which the sum is exact",
    OPTIMA,
    further=True,
)
def _shift(trial: Trial) -> Iterable[Finding]:
    inputs, info = trial.inputs, torch.finfo(trial.dtype)
    top = float(np.abs(np.where(np.isfinite(inputs.s), inputs.s, 0.0)).max(initial=0.0))
    shift = 2.0 ** math.ceil(math.log2(max(top, 1e-3))) * 2.0
    if 2.0 * shift > info.max:
        return
    grid = 2.0 * shift * info.eps
    finite = np.isfinite(inputs.s)
    near = inputs._replace(s=np.where(finite, np.round(np.where(finite, inputs.s, 0.0) / grid) * grid, inputs.s))
    far = near._replace(s=near.s + shift)
    (one, judged), (two, also) = trial.also(near), trial.also(far)
    yield trial.finding("shift", compare.row_errors(two.lam, one.lam), judged.value_bound + also.value_bound)


@_property(
    "monotone in k",
    "a larger k makes no weight smaller",
    "B of each",
    further=True,
)
def _monotone_in_k(trial: Trial) -> Iterable[Finding]:
    inputs, case = trial.inputs, trial.case
    compute = compare.compute_dtype(trial.dtype)
    count = inputs.counted().sum(axis=1)
    more = rounded(inputs.k + 0.25 * np.maximum(count - inputs.k, 0.0), compute)
    if not case.tensor_k:
        more = np.full_like(more, more[0])
    rows = inputs.regular() & (more >= inputs.k)
    other, judged = trial.also(inputs._replace(k=more))
    before, after = (np.where(rows[:, None], lam, 0.0) for lam in (trial.answer.lam, other.lam))
    with np.errstate(invalid="ignore"):
        fall = np.nan_to_num(before - after, nan=np.inf).max(axis=1, initial=0.0)
    yield from trial.some("monotone in k", rows, np.maximum(fall, 0.0), trial.judged.value_bound + judged.value_bound)


@_property(
    "monotone in a score",
    "raising one score raises its weight and no other",
    "B of each",
    OPTIMA,
    further=True,
)
def _monotone_in_a_score(trial: Trial) -> Iterable[Finding]:
    inputs = trial.inputs
    at = np.arange(len(inputs.k))
    pick = np.argmax(inputs.valid, axis=1)
    s = inputs.s.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        s[at, pick] = rounded(s[at, pick] + np.where(np.isfinite(inputs.eps), inputs.eps, 1.0), trial.dtype)
    raised = inputs._replace(s=s)
    rows = inputs.regular() & raised.regular()
    other, judged = trial.also(raised)
    change = np.nan_to_num(other.lam - trial.answer.lam, nan=np.inf)
    own = -change[at, pick]
    change[at, pick] = 0.0
    worst = np.maximum(np.maximum(change.max(axis=1, initial=0.0), own), 0.0)
    yield from trial.some("monotone in a score", rows, worst, trial.judged.value_bound + judged.value_bound)


@_property("softmax at k = 1", "with k = 1 lam is softmax(s / eps)", "B of lam", EXACT)
def _softmax(trial: Trial) -> Iterable[Finding]:
    inputs = trial.inputs
    rows = inputs.regular() & (inputs.k == 1.0)
    if not rows.any():
        return
    s = np.where(inputs.valid, inputs.s, -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        z = (s - s.max(axis=1, keepdims=True)) / inputs.eps[:, None]
        e = np.where(inputs.valid, np.exp(z), 0.0)
        wanted = e / e.sum(axis=1, keepdims=True)
        error = compare.row_errors(np.where(rows[:, None], trial.answer.lam, 0.0), np.where(rows[:, None], wanted, 0.0))
    yield from trial.some("softmax at k = 1", rows, error, trial.judged.value_bound)


@_property(
    "large eps",
    "as eps grows, the weights become equal: k / n each",
    "(k/n) (e^(spread/eps) - 1), and u (16 + log2 n) for the sum, and storage",
    EXACT,
    further=True,
)
def _large_eps(trial: Trial) -> Iterable[Finding]:
    inputs, info = trial.inputs, torch.finfo(trial.dtype)
    rows = inputs.regular()
    s = np.where(inputs.valid & rows[:, None], inputs.s, np.nan)
    with np.errstate(invalid="ignore"):
        spread = np.where(rows, np.fmax.reduce(s, axis=1) - np.fmin.reduce(s, axis=1), 0.0)
    eps = float(2.0 ** math.ceil(math.log2(max(float(spread.max()), 1.0)) + 20))
    lam = trial.lam(inputs._replace(eps=np.full_like(inputs.eps, eps)), replace(trial.case, eps=eps, tensor_eps=False))
    count = np.maximum(inputs.counted().sum(axis=1), 1)
    share = np.minimum(inputs.k, count) / count
    off = np.abs(np.where(inputs.valid, lam - share[:, None], 0.0)).max(axis=1, initial=0.0)
    summing = trial.unit * (16.0 + math.log2(max(trial.case.n, 1)))
    limit = share * (np.expm1(spread / eps) + summing + info.eps) + info.tiny
    yield from trial.some("large eps", rows, np.nan_to_num(off, nan=np.inf), limit)


@_property(
    "small eps",
    "as eps falls, the k highest scores have weight 1 and the others 0",
    "n e^(-gap/eps) for the gap between the k-th and the next score, and u (16) and storage",
    EXACT,
    further=True,
)
def _small_eps(trial: Trial) -> Iterable[Finding]:
    inputs, info = trial.inputs, torch.finfo(trial.dtype)
    count = inputs.counted().sum(axis=1)
    whole = np.maximum(np.minimum(np.floor(np.nan_to_num(inputs.k)), count - 1), 1)
    if not trial.case.tensor_k:
        whole = np.full_like(whole, whole[0])
    ordered = -np.sort(-np.where(inputs.counted(), inputs.s, -np.inf), axis=1)
    at = np.arange(len(count))
    last = np.minimum(whole, trial.case.n).astype(int) - 1
    after = np.minimum(last + 1, trial.case.n - 1)
    with np.errstate(invalid="ignore"):
        gap = ordered[at, last] - ordered[at, after]
    rows = inputs.regular() & (count >= 2) & (whole < count) & (gap > 0) & np.isfinite(gap)
    if not rows.any():
        return
    eps = float(gap[rows].min()) / 64.0
    if eps < 1e-30:
        return
    lam = trial.lam(inputs._replace(k=whole, eps=np.full_like(inputs.eps, eps)), replace(trial.case, eps=eps, tensor_eps=False))
    hard = inputs.counted() & (inputs.s >= np.where(rows, ordered[at, last], np.inf)[:, None])
    off = np.abs(np.where(rows[:, None], lam, 0.0) - hard).max(axis=1, initial=0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        limit = count * np.exp(-np.where(rows, gap, 0.0) / eps) + 16.0 * trial.unit + info.eps
    yield from trial.some("small eps", rows, np.nan_to_num(off, nan=np.inf), limit)


# --- gradients against each other ------------------------------------------------------------------------------------


def _with_g(trial: Trial, g: Array) -> tuple[Answer, Judged]:
    return trial.also(trial.inputs._replace(g=g), replace(trial.case, grad="dense"))


def _regular_g(trial: Trial, seed: int) -> Array:
    """Normal numbers in steps of an eighth, at most 4: sums of two are exact in every dtype."""
    steps = np.random.default_rng([seed, len(trial.case.rows)]).standard_normal(trial.inputs.s.shape)
    return np.where(trial.inputs.counted(), np.clip(np.round(8.0 * steps) / 8.0, -4.0, 4.0), 0.0)


def _comparable(trial: Trial, *judged: Judged) -> families.BoolArray:
    """Regular rows, [R], whose gradients the dtype can hold."""
    most = torch.finfo(trial.dtype).max / 2
    held = [np.abs(np.nan_to_num(one.truth.grad_scores, nan=np.inf)).max(axis=1, initial=0.0) <= most for one in judged]  # type: ignore[arg-type]
    return trial.regular & np.all(held, axis=0)


@_property("g = 0", "no gradient comes of none", "0: exact")
def _zero(trial: Trial) -> Iterable[Finding]:
    case, inputs = replace(trial.case, grad="dense"), trial.inputs._replace(g=np.zeros_like(trial.inputs.g))
    found = answer_of(call(trial.target, case, inputs, trial.device, trial.dtype, case.layout))
    rows = trial.regular & ~np.isnan(trial.inputs.k)
    error = np.abs(np.nan_to_num(found.grad_scores, nan=np.inf)).max(axis=1, initial=0.0)
    for gradient in (found.grad_k, found.grad_eps):
        if gradient is not None:
            error = np.maximum(error, np.abs(np.nan_to_num(gradient, nan=np.inf)))
    return trial.some("g = 0", rows, error, trial.none)


@_property("linear in g", "the gradient of a sum of losses is the sum of their gradients", "B of each of the three", further=True)
def _linear(trial: Trial) -> Iterable[Finding]:
    one, two = _regular_g(trial, 1), _regular_g(trial, 2)
    (a, of_a), (b, of_b), (c, of_c) = (_with_g(trial, g) for g in (one, two, one + two))
    rows = _comparable(trial, of_a, of_b, of_c)
    limits = [one.gradient_bounds["grad scores"] for one in (of_a, of_b, of_c)]
    found = [np.where(rows[:, None], one.grad_scores, 0.0) for one in (a, b, c)]
    error = compare.row_errors(found[2], found[0] + found[1])
    limit, left_out = np.sum([one for one, _ in limits], axis=0), np.any([left for _, left in limits], axis=0)
    yield trial.finding("linear in g", error, np.where(rows, limit, np.inf), left_out)


@_property(
    "symmetric Jacobian",
    "d lam_i / d s_j = d lam_j / d s_i, and the Jacobian has no negative eigenvalue",
    "B of each gradient times the norm of the other g",
    OPTIMA,
    further=True,
)
def _symmetric(trial: Trial) -> Iterable[Finding]:
    one, two = _regular_g(trial, 3), _regular_g(trial, 4)
    (a, of_a), (b, of_b) = _with_g(trial, one), _with_g(trial, two)
    rows = _comparable(trial, of_a, of_b)
    (limit_a, out_a), (limit_b, out_b) = of_a.gradient_bounds["grad scores"], of_b.gradient_bounds["grad scores"]
    of_one, of_two = (np.where(rows[:, None], one.grad_scores, 0.0) for one in (a, b))
    crossed = np.abs((two * of_one).sum(axis=1) - (one * of_two).sum(axis=1))
    negative = np.maximum(-(one * of_one).sum(axis=1), 0.0)
    both, alone = _norm(two) * limit_a + _norm(one) * limit_b, _norm(one) * limit_a
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.maximum(crossed, np.where(negative > 0, negative * (both / alone), 0.0))
    yield trial.finding("symmetric Jacobian", np.where(rows, error, 0.0), np.where(rows, both, np.inf), out_a | out_b)


@_property(
    "a constant g",
    "the weights sum to k whatever the scores are: a constant g has gradient 0 in the scores and g in k",
    "B of each gradient",
    EXACT,
    further=True,
)
def _constant(trial: Trial) -> Iterable[Finding]:
    found, judged = _with_g(trial, np.ones_like(trial.inputs.s))
    lam = judged.truth.lam
    rows = _comparable(trial, judged)
    limit, left_out = judged.gradient_bounds["grad scores"]
    error = _norm(found.grad_scores)
    if found.grad_k is not None and "grad k" in judged.gradient_bounds:
        bound_k, out_k = judged.gradient_bounds["grad k"]
        of_k = trial.none if judged.truth.grad_k is None else np.nan_to_num(judged.truth.grad_k)
        inner = ((lam > 0) & (lam < 1)).any(axis=1) & (of_k > 0.5)
        off = np.where(inner & rows & ~out_k, np.abs(found.grad_k - 1.0), 0.0)
        yield trial.finding("a constant g", off, bound_k, out_k | left_out)
    yield trial.finding("a constant g", np.where(rows, error, 0.0), limit, left_out)


@_property(
    "Euler",
    "lam(c s, c eps) = lam(s, eps), so sum s ds + eps d eps = 0",
    "eps times B of the gradient of eps, and the norm of s - tau times B of that of the scores",
    EXACT,
)
def _euler(trial: Trial) -> Iterable[Finding]:
    found, truth, eps = trial.answer, trial.truth, trial.inputs.eps
    if found.grad_eps is None or "grad eps" not in trial.judged.gradient_bounds:
        return
    rows = _comparable(trial, trial.judged) & np.isfinite(truth.threshold)
    (limit_s, out_s), (limit_e, out_e) = (trial.judged.gradient_bounds[name] for name in ("grad scores", "grad eps"))
    free = (truth.lam > 0) & (truth.lam < 1) & rows[:, None]
    away = np.where(free, np.where(free, trial.inputs.s, 0.0) - np.where(rows, truth.threshold, 0.0)[:, None], 0.0)
    with np.errstate(invalid="ignore"):
        error = np.abs((away * np.where(free, found.grad_scores, 0.0)).sum(axis=1) + eps * found.grad_eps)
        # tau and s - tau in float64
        own = 2.0**-50 * np.abs(truth.threshold) * _norm(np.where(free, found.grad_scores, 0.0))
    limit = eps * limit_e + _norm(away) * limit_s + own
    yield trial.finding("Euler", np.where(rows, error, 0.0), np.where(rows, limit, np.inf), out_s | out_e)


# --- how it runs -----------------------------------------------------------------------------------------------------


def _on_gpu(trial: Trial) -> bool:
    return trial.device.type == "cuda"


@_property(
    "20 replays",
    "20 more calls give the same bits; on a GPU every second one beside another stream that is busy",
    "0: exact",
    execution=True,
)
def _twenty(trial: Trial) -> Iterable[Finding]:
    case, error = trial.case, trial.none
    side = torch.cuda.Stream(trial.device) if _on_gpu(trial) else None
    load = torch.ones(2048, 2048, device=trial.device) if side is not None else None
    for i in range(20):
        if side is not None and load is not None and i % 2:
            with torch.cuda.stream(side):
                for _ in range(8):
                    load = load @ load * 2.0**-11
        again = call(trial.target, case, trial.inputs, trial.device, trial.dtype, case.layout)
        error = error + differing(trial.first, again)
    if _on_gpu(trial):
        torch.cuda.synchronize(trial.device)
    return [trial.finding("20 replays", error, trial.none)]


@_property("side stream", "on a stream that is not the default one it gives the same bits", "0: exact", execution=True)
def _side_stream(trial: Trial) -> Iterable[Finding]:
    if not _on_gpu(trial):
        return ()
    case, side = trial.case, torch.cuda.Stream(trial.device)
    torch.cuda.synchronize(trial.device)
    # the default stream is kept busy: what is launched there by mistake comes too late
    load = torch.ones(4096, 4096, device=trial.device)
    for _ in range(20):
        load = load @ load * 2.0**-12
    with torch.cuda.stream(side):
        again = call(trial.target, case, trial.inputs, trial.device, trial.dtype, case.layout)
        side.synchronize()
        error = differing(trial.first, again)
    torch.cuda.synchronize(trial.device)
    return [trial.finding("side stream", error, trial.none)]


@_property(
    "CUDA graph",
    "captured forward and backward, and replayed on other scores, it gives the bits of an eager call on them",
    "0: exact",
    execution=True,
)
def _graph(trial: Trial) -> Iterable[Finding]:
    if not _on_gpu(trial):
        return ()
    case, inputs, at = trial.case, trial.inputs, trial.device
    other = inputs._replace(s=inputs.s[::-1].copy(), g=inputs.g[::-1].copy())
    eager = call(trial.target, case, other, at, trial.dtype, "contiguous")
    scores, k, extra = arguments_of(trial.target, case, inputs, at, trial.dtype, "contiguous")
    g = torch.from_numpy(inputs.g).to(at, trial.dtype)
    leaves = (scores, k, extra.get("eps"))

    def step() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        lam = trial.target(scores, k, **extra)
        return lam.detach(), backward(lam, leaves, g)

    side = torch.cuda.Stream(at)
    side.wait_stream(torch.cuda.current_stream(at))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(at).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lam, gradients = step()
    with torch.no_grad():
        scores.copy_(torch.from_numpy(other.s).to(at, trial.dtype))
        g.copy_(torch.from_numpy(other.g).to(at, trial.dtype))
    graph.replay()
    torch.cuda.synchronize(at)
    return [trial.finding("CUDA graph", differing(eager, Called(lam, gradients, [], [])), trial.none)]


@_property(
    "gradcheck",
    "torch.autograd.gradcheck agrees in float64, on rows without a score near a threshold",
    "gradcheck's own: 1e-5, and 1e-3 relative",
    execution=True,
)
def _gradcheck(trial: Trial) -> Iterable[Finding]:
    if trial.dtype != torch.float64:
        return
    case = replace(trial.case, n=7, rows=tuple(("normal", seed) for seed in range(12)), grad="dense", layout="contiguous")
    inputs = draw(case)
    if case.op in SOLVERS:
        # differences of 1e-6 must not step over a kink
        truth = truth_of(case, inputs, 1e-5)
        calm = truth.slack_scores == 0
        case = replace(case, rows=tuple(row for row, keep in zip(case.rows, calm, strict=True) if keep))
        inputs = Inputs(*(array[calm] for array in inputs))
    if not case.rows:
        return
    scores, k, extra = arguments_of(trial.target, case, inputs, trial.device, torch.float64, "contiguous")
    names = [name for name, value in extra.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    tensors = [scores, *([k] if isinstance(k, torch.Tensor) else []), *(extra[name] for name in names)]

    def function(*values: torch.Tensor) -> torch.Tensor:
        rest = list(values[1:])
        budget = rest.pop(0) if isinstance(k, torch.Tensor) else k
        return trial.target(values[0], budget, **(extra | dict(zip(names, rest, strict=True))))

    try:
        torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0)
    except GradcheckError as error:
        text = " ".join(str(error).split())[:300]
        yield Finding("gradcheck", trial.none + np.inf, trial.none, trial.nobody, text)
        return
    yield trial.finding("gradcheck", trial.none, trial.none)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the first call of every operator that is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[bool, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims", "profiler", "c10d"):
            self.calls.setdefault(func, (torch.is_grad_enabled(), args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@_property(
    "opcheck",
    "torch.library.opcheck passes for every operator that it registers and calls",
    "none: it does or it does not",
    execution=True,
)
def _opcheck(trial: Trial) -> Iterable[Finding]:
    scores, k, extra = arguments_of(trial.target, trial.case, trial.inputs, trial.device, trial.dtype, "contiguous")
    with _Recorder() as seen:
        lam = trial.target(scores, k, **extra)
        backward(lam, (scores, k, extra.get("eps")), torch.ones_like(lam))
    for operator, (differentiated, arguments, keywords) in seen.calls.items():
        # opcheck wants leaves, and only what was differentiated when it was called need be differentiable
        leaves = [
            value.detach().requires_grad_(value.requires_grad and differentiated) if isinstance(value, torch.Tensor) else value
            for value in arguments
        ]
        try:
            torch.library.opcheck(operator, tuple(leaves), keywords)
        except Exception as error:
            text = f"{operator}: {' '.join(str(error).split())[:300]}"
            yield Finding("opcheck", trial.none + np.inf, trial.none, trial.nobody, text)
        else:
            yield trial.finding("opcheck", trial.none, trial.none)


@_property(
    "variants",
    "every launch (variant, tile, number of checkpoint segments) gives the oracle's values and gradients, and so the same",
    "B of lam and of each gradient",
    SOLVERS,
    execution=True,
)
def _variants(trial: Trial) -> Iterable[Finding]:
    return ()  # measured by the suite, which is told what else can be launched


def execution_case(op: str, dtype: str) -> Case:
    """The case on which the properties of how it runs are measured: regular rows, tensors for what may be one."""
    rows = tuple(("normal" if seed % 2 else "uniform", seed) for seed in range(8))
    schedule: dict[str, Any] = PUBLISHED if op == "coordinate_descent" else {"eps": 0.1}
    return Case(op, dtype, 1024, rows, tensor_k=True, tensor_eps=op == "soft_topk", **schedule)


ALWAYS = tuple(name for name, one in PROPERTIES.items() if not one.further and not one.execution)
"""The properties that every case is measured by."""
EXECUTION = tuple(name for name, one in PROPERTIES.items() if one.execution)
"""How it runs: on one case for each operator and dtype."""
PROOF = (
    "values", "grad scores", "grad k", "grad eps", "box", "budget", "stationarity", "duality gap", "order", "replays bitwise",
    "inputs untouched", "guard bands", "row alone", "permutation", "masked tail", "scale",
)  # fmt: skip
"""What a launch configuration of the autotuner is proved by."""
