"""The named families of input that every kernel is judged on.

A family draws one row: scores, which entries are valid, and a budget. Rows of one length are stacked into a batch, so that one
launch checks many of them. Lengths (odd, powers of two and their neighbours) and memory layouts belong to the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .oracles import Array

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Row:
    """One drawn row: scores [n] in float64, valid [n] (True = counts), and the budget k."""

    scores: Array
    valid: BoolArray
    k: float


@dataclass(frozen=True)
class Family:
    """A named family of rows.

    Attributes:
        name: as it appears in tables.
        sentence: what it is, for a person.
        draw: (generator, n) -> Row.
        regular: False where the family holds NaN or infinite entries, or rows in which nothing is valid.
        masked: whether its rows have entries that are masked.
    """

    name: str
    sentence: str
    draw: Callable[[np.random.Generator, int], Row]
    regular: bool = True
    masked: bool = False


FAMILIES: dict[str, Family] = {}


def _family(name: str, sentence: str, regular: bool = True, masked: bool = False) -> Callable[[Any], Any]:
    def register(draw: Callable[[np.random.Generator, int], Row]) -> Callable[[np.random.Generator, int], Row]:
        FAMILIES[name] = Family(name, sentence, draw, regular, masked)
        return draw

    return register


def _all(n: int) -> BoolArray:
    return np.ones(n, bool)


def _some_k(rng: np.random.Generator, n: int) -> float:
    """A budget between a sixteenth and a half of n, rarely a whole number."""
    return float(max(0.5, n * rng.uniform(1 / 16, 1 / 2)))


@_family("normal", "standard normal scores, k of any size")
def _normal(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), _all(n), _some_k(rng, n))


@_family("uniform", "uniform scores in [-1, 1]")
def _uniform(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.uniform(-1, 1, n), _all(n), _some_k(rng, n))


@_family("cauchy", "Cauchy scores: a few are enormous")
def _cauchy(rng: np.random.Generator, n: int) -> Row:
    return Row(np.minimum(np.maximum(rng.standard_cauchy(n), -3e4), 3e4), _all(n), _some_k(rng, n))


@_family("ties", "scores from four values only")
def _ties(rng: np.random.Generator, n: int) -> Row:
    return Row(0.5 * rng.integers(0, 4, n).astype(np.float64), _all(n), _some_k(rng, n))


@_family("constant", "one value throughout")
def _constant(rng: np.random.Generator, n: int) -> Row:
    return Row(np.full(n, rng.uniform(-2, 2)), _all(n), _some_k(rng, n))


@_family("bimodal gap", "two narrow heaps far apart, and a budget near the size of the upper one")
def _bimodal(rng: np.random.Generator, n: int) -> Row:
    upper = max(1, n // 4)
    scores = np.where(rng.permutation(n) < upper, 5.0, -5.0) + 0.05 * rng.standard_normal(n)
    return Row(scores, _all(n), float(max(0.5, min(n, upper + rng.uniform(-2, 2)))))


@_family("k = 1", "a budget of one: a softmax")
def _one(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), _all(n), 1.0)


@_family("k = n - 1", "all but one entry")
def _all_but_one(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), _all(n), float(max(n - 1, 0)))


@_family("k >= n", "a budget of as many entries as there are, or more")
def _more_than_all(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), _all(n), float(n + rng.integers(0, 3)))


@_family("k = 0", "no budget")
def _none(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), _all(n), 0.0)


@_family("fractional k", "budgets below one and a little beside whole numbers")
def _fractional(rng: np.random.Generator, n: int) -> Row:
    k = rng.choice([0.01, 0.37, 0.999, 1.001, n / 2 + 0.5, n - 0.25])
    return Row(rng.standard_normal(n), _all(n), float(min(max(k, 0.01), n)))


@_family("huge scale", "normal scores times ten thousand")
def _huge(rng: np.random.Generator, n: int) -> Row:
    return Row(np.clip(1e4 * rng.standard_normal(n), -6e4, 6e4), _all(n), _some_k(rng, n))


@_family("tiny scale", "normal scores times 1e-4")
def _tiny(rng: np.random.Generator, n: int) -> Row:
    return Row(1e-4 * rng.standard_normal(n), _all(n), _some_k(rng, n))


@_family("offset", "normal scores far from zero")
def _offset(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n) + rng.choice([-1000.0, 1000.0]), _all(n), _some_k(rng, n))


@_family("ragged mask", "a padded sequence: a valid head of any length, NaN in the padding", masked=True)
def _ragged(rng: np.random.Generator, n: int) -> Row:
    length = int(rng.integers(1, n + 1)) if n else 0
    scores = rng.standard_normal(n)
    valid = np.arange(n) < length
    scores[~valid] = rng.choice([np.nan, np.inf, 1e4])
    return Row(scores, valid, _some_k(rng, max(length, 1)))


@_family("holes", "a mask with holes", masked=True)
def _holes(rng: np.random.Generator, n: int) -> Row:
    valid = rng.random(n) < 0.6
    return Row(rng.standard_normal(n), valid, _some_k(rng, n))


def _beside_the_valid(rng: np.random.Generator, n: int, beside: tuple[float, ...]) -> Row:
    valid = rng.random(n) < 0.6
    if n:
        valid[rng.integers(n)] = True
    return Row(rng.standard_normal(n), valid, max(0.01, float(valid.sum()) + float(rng.choice(beside))))


@_family("k near the valid", "a mask with holes, and a budget at or just below the number of valid entries", masked=True)
def _near_the_valid(rng: np.random.Generator, n: int) -> Row:
    return _beside_the_valid(rng, n, (-1.0, -0.25, 0.0))


@_family("k beyond the valid", "a mask with holes, and a budget above the number of valid entries", masked=True)
def _beyond_the_valid(rng: np.random.Generator, n: int) -> Row:
    return _beside_the_valid(rng, n, (0.25, 1.0, 10.0))


@_family("all masked", "nothing is valid", regular=False, masked=True)
def _all_masked(rng: np.random.Generator, n: int) -> Row:
    return Row(rng.standard_normal(n), np.zeros(n, bool), _some_k(rng, n))


@_family("NaN", "one valid entry is NaN", regular=False)
def _nan(rng: np.random.Generator, n: int) -> Row:
    scores = rng.standard_normal(n)
    if n:
        scores[rng.integers(n)] = np.nan
    return Row(scores, _all(n), _some_k(rng, n))


@_family("infinite", "some scores are +inf, some -inf", regular=False)
def _infinite(rng: np.random.Generator, n: int) -> Row:
    scores = rng.standard_normal(n)
    scores[rng.random(n) < 0.1] = -np.inf
    scores[rng.random(n) < 0.05] = np.inf
    return Row(scores, _all(n), _some_k(rng, n))


LAYOUTS = ("contiguous", "transposed", "strided", "padded rows")
"""Memory layouts of a batch: the same values, other strides."""

MARGIN = 64
"""Entries of NaN (or True) on both sides of every input; a multiple of what vector loads are aligned to."""


def within(values: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, with a margin of NaN (or True) on both sides, so that a stray read or write shows."""
    flat = torch.full((values.numel() + 2 * MARGIN,), _filler(values), dtype=values.dtype, device=values.device)
    inside = flat[MARGIN : MARGIN + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same [R, n] values in another memory layout; what lies between and around is NaN (or True)."""
    rows, n = values.shape
    if layout == "contiguous":
        return within(values)
    if layout == "transposed":
        return within(values.t()).t()
    if layout == "strided":
        return _column_slice(values, within(values.new_full((rows, max(2 * n, 1)), _filler(values)))[:, ::2][:, :n])
    if layout == "padded rows":
        return _column_slice(values, within(values.new_full((rows, n + 3), _filler(values)))[:, :n])
    raise ValueError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}")


def _filler(values: torch.Tensor) -> float | bool:
    return torch.nan if values.is_floating_point() else True


def _column_slice(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.copy_(values)
    return out


def lengths(most: int) -> list[int]:
    """Lengths worth trying up to ``most``: the small ones, and powers of two with their odd neighbours."""
    found = {1, 2, 3, 5, 7, 10, 100, 1000}
    power = 8
    while power <= most:
        found |= {power - 1, power, power + 1}
        power *= 2
    return sorted(n for n in found if n <= most)
