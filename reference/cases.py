"""What an operator is called on: a case is a batch of rows of named families, and how the call is made.

A :class:`Case` is small, hashable, and its ``repr`` is code that makes it again. :func:`draw` makes its arrays. Cases come from
:func:`strategy` (hypothesis), narrowed to a :class:`Facet`: one kind of input, beside plain ones. Batches are drawn rather than
rows, since a launch for each row would be too slow on a GPU; a failing batch is shrunk to few and short rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from . import compare, families
from .oracles import Array

KINDS = ("soft_topk", "coordinate_descent", "relaxed_topk")
"""What an operator computes. ``relaxed_topk`` is any other relaxation of top-k: weights in [0, 1] that sum to k, of another
objective than ours, such as entmax's budget_bisect."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
GRADS = ("dense", "one-hot", "expanded", "transposed", "strided")
"""The gradient that is handed to the backward: its values and how they lie in memory."""
BATCH_ELEMENTS = 1 << 18
"""The most entries of a drawn batch that has more than one row."""

PUBLISHED: dict[str, Any] = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
"""The schedule that CoLT5-attention's router uses."""


@dataclass(frozen=True)
class Case:
    """A batch of rows and how the operator is called on it.

    Attributes:
        op: one of ``KINDS``.
        dtype: of the scores, such as "float32".
        n: length of the rows.
        rows: (family, seed) of every row.
        eps: temperature; of coordinate descent the final one.
        n_iters, eps_init, eps_decay: of coordinate descent.
        tensor_k: k as a tensor, one value a row; else every row has the first one's k, as a number.
        tensor_eps: likewise for eps of soft_topk; the values differ from row to row.
        layout: how the scores (and the mask) lie in memory, one of ``families.LAYOUTS``.
        grad: the gradient of lam, one of ``GRADS``.
        segments: checkpoint_segments of coordinate descent; None leaves it to the implementation.
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
    grad: str = "dense"
    segments: int | None = None

    def schedule(self) -> dict[str, Any]:
        """The arguments that coordinate descent has beside eps."""
        if self.op != "coordinate_descent":
            return {}
        return {"n_iters": self.n_iters, "eps_init": self.eps_init, "eps_decay": self.eps_decay}


class Inputs(NamedTuple):
    """A case drawn: float64 arrays that hold exactly what the dtypes of the call can hold."""

    s: Array  # [R, n]
    valid: families.BoolArray  # [R, n]
    k: Array  # [R]
    eps: Array  # [R]
    g: Array  # [R, n], the gradient of lam

    def counted(self) -> families.BoolArray:
        """Entries that count, [R, n]: valid and not -inf."""
        return self.valid & (self.s > -np.inf)

    def regular(self) -> families.BoolArray:
        """Rows [R] with something valid, and nothing valid that is not finite."""
        return np.asarray(self.valid.any(axis=1) & (np.isfinite(self.s) | ~self.valid).all(axis=1))


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """The nearest numbers of ``dtype``, as float64."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).to(torch.float64).numpy()


def draw(case: Case) -> Inputs:
    """The arrays of a case."""
    dtype = getattr(torch, case.dtype)
    compute = compare.compute_dtype(dtype)
    made = [families.FAMILIES[name].draw(np.random.default_rng([seed, case.n]), case.n) for name, seed in case.rows]
    s = rounded(np.stack([row.scores for row in made]), dtype)
    valid = np.stack([row.valid for row in made])
    k = np.array([row.k for row in made])
    if not case.tensor_k:
        k = np.full_like(k, k[0])
    rng = np.random.default_rng([seed for _, seed in case.rows])
    eps = np.full_like(k, case.eps)
    if case.tensor_eps:
        eps = case.eps * rng.uniform(0.5, 2.0, len(k))
    g = _gradient(case, rng, s, valid)
    return Inputs(s, valid, rounded(k, compute), rounded(eps, compute) if case.tensor_eps else eps, rounded(g, dtype))


def _gradient(case: Case, rng: np.random.Generator, s: Array, valid: families.BoolArray) -> Array:
    if case.grad == "expanded":
        return np.broadcast_to(rng.standard_normal(), s.shape).copy()
    if case.grad == "one-hot":
        g = np.zeros_like(s)
        g[np.arange(len(s)), rng.integers(0, s.shape[1], len(s))] = 1.0
        return g
    # a large gradient at what does not count: it must have no part in anything
    return np.where(valid & (s > -np.inf), rng.standard_normal(s.shape), 100.0)


# --- facets ----------------------------------------------------------------------------------------------------------

_REGULAR = tuple(name for name, family in families.FAMILIES.items() if family.regular)
_UNMASKED = tuple(name for name in families.FAMILIES if not families.FAMILIES[name].masked)


@dataclass(frozen=True)
class Facet:
    """One kind of input. All but ``everything`` vary one thing from plain input, so that a failure says what it hangs on.

    Attributes:
        name: as it appears in tables.
        sentence: what it is, for a person.
        families: the rows.
        length: "power" (powers of two), "any" (no power of two), "long" (65,535 and more), or "mixed" (up to 16,384).
        eps: temperatures; none means 0.1, and of coordinate descent the published one.
        layouts, grads: see :class:`Case`.
        tensors: (tensor_k, tensor_eps), see :class:`Case`; a kernel is compiled for each combination.
        schedules: of coordinate descent: "published" or "any".
        segments: checkpoint_segments of coordinate descent, at most n_iters are given.
        kinds: the operators that it is for.
        batch: rows of a batch, fewer where they would have more than ``BATCH_ELEMENTS`` entries.
    """

    name: str
    sentence: str
    families: tuple[str, ...] = ("normal", "uniform")
    length: str = "power"
    eps: tuple[float, ...] = ()
    layouts: tuple[str, ...] = ("contiguous",)
    grads: tuple[str, ...] = ("dense",)
    tensors: tuple[tuple[bool, bool], ...] = ((False, False),)
    schedules: str = "published"
    segments: tuple[int | None, ...] = (None,)
    kinds: tuple[str, ...] = KINDS
    batch: int = 16


_BOTH_OR_NEITHER = ((False, False), (True, True))
_OURS, _DESCENT = ("soft_topk", "coordinate_descent"), ("coordinate_descent",)

FACETS: dict[str, Facet] = {
    facet.name: facet
    for facet in (
        Facet("plain", "normal and uniform scores, lengths that are powers of two, contiguous"),
        Facet("any length", "lengths that are no power of two, from one entry on", length="any"),
        Facet("long rows", "65,535 entries to more than a million", length="long", batch=2),
        Facet(
            "k near all",
            "k at and just below the number of valid entries",
            ("k = n - 1", "k near the valid"),
            tensors=_BOTH_OR_NEITHER,
        ),
        Facet("k beyond all", "k above it: as a tensor taken for it", ("k >= n", "k beyond the valid"), tensors=_BOTH_OR_NEITHER),
        Facet("small k", "k of one, below one, and 0", ("k = 1", "fractional k", "k = 0")),
        Facet("masks", "padding that holds NaN, and masks with holes", ("ragged mask", "holes")),
        Facet("all masked", "rows in which nothing is valid, beside others", ("all masked", "holes")),
        Facet("not finite", "NaN and infinite scores, beside others", ("NaN", "infinite", "normal")),
        Facet("ties", "few distinct scores, or one", ("ties", "constant")),
        Facet("scales", "huge, tiny and far-off scores, and gaps", ("huge scale", "tiny scale", "offset", "cauchy", "bimodal gap")),
        Facet("small eps", "temperatures far below the spread of the scores", eps=(1e-3, 1e-6), kinds=_OURS),
        Facet("schedules", "1 to 50 iterations, with and without eps-scaling", schedules="any", kinds=_DESCENT),
        Facet(
            "tensors",
            "k, and eps where it may be, as tensors with a gradient",
            tensors=(*_BOTH_OR_NEITHER, (True, False), (False, True)),
        ),
        Facet("strides", "scores that are not contiguous", layouts=families.LAYOUTS[1:]),
        Facet("gradients", "one-hot, expanded, transposed and strided gradients of lam", grads=GRADS[1:]),
        Facet("segments", "more than one checkpoint segment", segments=(2, 3, 7, 20), kinds=_DESCENT),
        Facet(
            "everything",
            "all of these at once",
            tuple(families.FAMILIES),
            "mixed",
            (0.1, 0.03, 0.5, 1.0, 1e-3, 1e-6),
            families.LAYOUTS,
            GRADS,
            tensors=_BOTH_OR_NEITHER,
            schedules="any",
            segments=(None, 1, 2, 3, 7, 20),
            batch=64,
        ),
    )
}
"""The kinds of input, simplest first."""

_SHORT, _MIDDLE = (1, 2, 3, 5, 7, 8), (66, 100, 127, 128, 513, 1000, 1023, 1024)
LENGTHS = {
    "power": (64, 1024),
    "any": (1, 3, 5, 7, 66, 100, 127, 513, 1000, 1023, 2049, 4095),
    "mixed": (*_SHORT, *_MIDDLE, 2049, 4095, 4096, 16384),
    "long": (131072, 131073, 65535, 65536, 131071, 262144, 1000003),
}
"""Lengths of rows, of few powers of two and what lies between: a kernel is compiled anew for each power of two."""


def facet_lengths(facet: Facet, longest: int) -> list[int]:
    """The lengths of rows of a facet, none above ``longest``; empty where it has none so short."""
    found = [n for n in LENGTHS[facet.length] if n <= longest]
    return found or ([] if facet.length == "long" else [longest])


def strategy(
    op: str, dtype: str = "float32", longest: int = 1024, facet: str = "everything", masks: bool = True, full: bool = False
) -> Any:
    """A hypothesis strategy of cases; the simplest is one normal row of the facet's shortest length.

    Args:
        op: one of ``KINDS``.
        dtype: of the scores.
        longest: the longest rows.
        facet: a name of ``FACETS``.
        masks: False leaves out rows of which entries are masked.
        full: batches have as many rows as they may: as many rows for fewer launches, but nothing to shrink.

    Raises:
        ValueError: nothing is left: no length of the facet is that short, or all its rows are masked.
    """
    from hypothesis import strategies as st

    kind = FACETS[facet]
    lengths = facet_lengths(kind, longest)
    names = [name for name in kind.families if masks or name in _UNMASKED]
    if not lengths or not names:
        raise ValueError(f"facet {facet!r} has no rows of at most {longest} entries{'' if masks else ' without a mask'}")
    rows_most = {n: kind.batch if kind.length == "long" else max(1, min(kind.batch, BATCH_ELEMENTS // n)) for n in lengths}
    row = st.tuples(st.sampled_from(names), st.integers(0, 1 << 16))
    schedules: Any = st.just({})
    segments: Any = st.none()
    if op == "coordinate_descent":
        found = [PUBLISHED | {"eps": eps} for eps in kind.eps or (PUBLISHED["eps"],)]
        if kind.schedules == "any":
            others = (
                {"n_iters": 1},
                {"n_iters": 5},
                {"n_iters": 50, "eps_init": 1.0, "eps_decay": 0.9},
                {"n_iters": 12, "eps": 0.5},
            )
            found = [PUBLISHED, *(({"eps": 0.1} | one) for one in others)]
        schedules = st.sampled_from(found)
        segments = st.sampled_from(kind.segments)

    def build(
        n: int,
        rows: list[tuple[str, int]],
        eps: float,
        schedule: dict[str, Any],
        tensors: tuple[bool, bool],
        layout: str,
        grad: str,
        segments: int | None,
    ) -> Case:
        if segments is not None:
            segments = min(segments, schedule["n_iters"])
        made = Case(
            op, dtype, n, tuple(rows[: rows_most[n]]), eps,
            tensor_k=tensors[0], tensor_eps=tensors[1] and op == "soft_topk", layout=layout, grad=grad, segments=segments,
        )  # fmt: skip
        return replace(made, **schedule)

    return st.builds(
        build,
        st.sampled_from(lengths),
        st.lists(row, min_size=max(rows_most.values()) if full else 1, max_size=max(rows_most.values())),
        st.sampled_from(kind.eps or (0.1,)),
        schedules,
        st.sampled_from(kind.tensors),
        st.sampled_from(kind.layouts),
        st.sampled_from(kind.grads),
        segments,
    )


# --- one configuration of the autotuner ------------------------------------------------------------------------------

PROOF_ELEMENTS = 1 << 20
"""Entries of a batch of a proof, at most."""


def proof_cases(op: str, dtype: str, n: int, seed: int, most: int | None = None) -> list[Case]:
    """The cases on which a launch configuration for rows of ``n`` scores is proved: first those without a mask.

    Lengths n, and n - 3 with a mask and tensors for k and eps; every family where there is room for it. There are as many rows of
    a length as there are families, or fewer where rows are very long.

    Args:
        op, dtype: of every case.
        n: the length of rows that the configuration is for.
        seed: of the rows.
        most: rows of a batch, at most; None is any. Where programs share a row, fewer of them may share each of more rows, and
            then it is another kernel that runs.
    """
    names = list(families.FAMILIES)
    plain = [name for name in _REGULAR if name in _UNMASKED]
    room = max(2, min(len(names), PROOF_ELEMENTS // max(n, 1)))
    size = room if most is None else min(most, room)
    schedule: dict[str, Any] = PUBLISHED if op == "coordinate_descent" else {"eps": 0.1}
    if size < len(names):
        # some of the families in each batch: one that is masked, and of the others first those that the cases without a mask lack
        masked = itertools.cycle([name for name in names if name not in _UNMASKED])
        others = itertools.cycle([name for name in reversed(names) if name in _UNMASKED])
        names = [next(others if i % size else masked) for i in range(-(-room // size) * size)]

    def batches(pool: list[str], length: int, **how: Any) -> list[Case]:
        rows = [(pool[i % len(pool)], seed + i) for i in range(len(names))]
        found = [tuple(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
        return [Case(op, dtype, length, batch, **how, **schedule) for batch in found]

    return [
        *batches(plain, n, tensor_k=False),
        *batches(names, max(1, n - 3), tensor_k=True, tensor_eps=op == "soft_topk"),
    ]
