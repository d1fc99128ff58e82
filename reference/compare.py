"""How right is right: errors in a norm against float64, and the bounds they are held to.

The rule: a row's error may be at most twice that of plain torch in the working precision, running the same algorithm on
the same input, plus the rounding that no arithmetic in that precision avoids. The second term is a running error bound that
the oracle works out beside the truth (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3), in units of the
roundoff. It grows with what is rounded, never with n alone, and no tolerance is chosen by hand.

Kinks: where a score lies at a threshold to within rounding, the gradient has no unique value in floating point. A row with such
an entry (at any iteration, for coordinate descent) is left out of gradient comparisons and counted; a check in which more than
``KINK_SHARE`` of the rows were left out fails.
"""

from __future__ import annotations

import numpy as np
import torch

from .oracles import Array

KINK_SHARE = 0.25
FAILED = np.inf


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The working precision: float64 for float64 scores, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff of a dtype: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def storage_floor(truth: Array, dtype: torch.dtype) -> Array:
    """What storing the exact answer in ``dtype`` may cost in the norm of a row, [R].

    Entries below the normal range round absolutely.
    """
    info = torch.finfo(dtype)
    with np.errstate(over="ignore"):
        finite = np.nan_to_num(truth, nan=0.0, posinf=0.0, neginf=0.0)
        entry = np.maximum(np.abs(finite) * info.eps / 2, info.tiny * (1.0 if dtype == torch.float32 else info.eps))
    return np.sqrt(np.sum(entry * entry, axis=-1)) if truth.ndim > 1 else entry


def row_errors(found: Array, truth: Array, dtype: torch.dtype = torch.float64) -> Array:
    """The norm of found - truth of every row, [R].

    A row that must be NaN has error 0 if all of it is; any other NaN is a failure. What is beyond the range of ``dtype``, in
    which the result is stored, is rightly infinite there.
    """
    found, truth = np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if found.ndim == 1:
        found, truth = found[:, None], truth[:, None]
    most = torch.finfo(dtype).max
    found, truth = np.clip(found, -most, most), np.clip(truth, -most, most)
    must = np.isnan(truth)
    with np.errstate(invalid="ignore"):
        difference = np.where(must, np.where(np.isnan(found), 0.0, FAILED), found - truth)
    difference = np.where(np.isnan(difference), FAILED, difference)
    with np.errstate(over="ignore"):
        return np.sqrt(np.sum(difference * difference, axis=1))


def bound(plain_error: Array, floor: Array, stored: Array, dtype: torch.dtype) -> Array:
    """The largest error a row may have, [R].

    Args:
        plain_error: the error of plain torch in the working precision; not finite where it has no answer.
        floor: the oracle's running error bound, in units of the roundoff.
        stored: what storing the answer costs (:func:`storage_floor`).
        dtype: of the scores.
    """
    plain = np.where(np.isfinite(plain_error), plain_error, 0.0)
    # in float64 the oracle rounds as much as what it judges
    both = 2.0 if dtype == torch.float64 else 1.0
    return 2.0 * plain + both * floor * roundoff(compute_dtype(dtype)) + stored
